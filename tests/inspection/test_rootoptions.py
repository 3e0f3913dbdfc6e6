"""Which subvolume of btrfs a command line, and a whole menu, makes the root."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.trees import OS_RELEASE, Tree, make_tree
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.bootmenu import named_subvolumes, read_boot_menus
from vmprovision.inspection.bootmenu.rootoptions import RootOptions, root_options

if TYPE_CHECKING:
    from pathlib import Path

UUID = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a1304"
HERE = f"root=UUID={UUID}"
ELSEWHERE = "root=UUID=another"
GRUB = f"""\
set default=DEFAULT
menuentry 'Debian' {{ linux /@/boot/vmlinuz {HERE} ro rootflags=subvol=@ $extra; }}
submenu 'Snapshots' {{
menuentry 'Snapshot' {{ linux /@snap/boot/vmlinuz {HERE} ro rootflags=subvol=@snap; }}
}}
menuentry 'Another' {{ linux /v {ELSEWHERE} ro rootflags=subvol=root; }}
menuentry 'Default subvolume' {{ linux /v {HERE} ro; }}
menuentry 'Unknown' {{ probe -u x --set=it; linux /v {HERE} rootflags=subvol=$it; }}
"""
ENTRY = "title {}\nlinux /v\noptions " + HERE + " rootflags=subvol={}\n"


@pytest.mark.parametrize(
    ("line", "device", "subvolume"),
    [
        ("ro quiet", "", ""),
        ("root=LABEL=a ro", "LABEL=a", ""),
        ("root=/dev/vda1 root=/dev/vda2 rootflags=subvol=@", "/dev/vda2", "subvol=@"),
        ("rootflags=compress=zstd,subvol=/@/,noatime", "", "subvol=@"),
        ("rootflags=subvol=@/.snapshots/7/snapshot", "", "subvol=@/.snapshots/7/snapshot"),
        ("rootflags=subvol=a,subvol=b", "", "subvol=b"),
        ("rootflags=subvolid=0257", "", "subvolid=257"),
        ("rootflags=subvol=/", "", "subvolid=5"),
        ("rootflags=subvolid=0", "", "subvolid=5"),
        ("rootflags=noatime", "", ""),
        ('rootflags="subvol=@"', "", "subvol=@"),
        ('"rootflags=subvol=@"', "", "subvol=@"),
        ("rootflags=subvol=@ rootflags=subvol=@", "", "subvol=@"),
        ("noroot=x norootflags=subvol=a", "", ""),
        # not certain
        ("rootflags=subvol=a rootflags=subvol=b", "", "subvol=b"),
        ("rootflags=subvol=a rootflags=noatime", "", None),
        ("rootflags=subvol=@,subvolid=256", "", None),
        ("rootflags=subvolid=x", "", None),
        ("rootflags=subvolid=-1", "", None),
        (f"rootflags=subvolid={'9' * 5000}", "", ""),  # longer than any option
        (f"rootflags=subvolid={'9' * 90}", "", None),
        ("rootflags=subvol=\0", "", None),
        ('rootflags=subvol="my root"', "", None),
        ("root=\0 rootflags=subvol=@", "", "subvol=@"),
    ],
)
def test_a_command_line(line: str, device: str, subvolume: str | None) -> None:
    """The last option counts, paths have one form, and what is not certain is a doubt."""
    assert root_options(line) == RootOptions(device, subvolume)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", "0")}, {"subvol=@"}),
        ({"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", "'1>0'")}, {"subvol=@snap"}),
        ({"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", "2")}, set()),
        ({"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", "3")}, {""}),
        ({"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", "4")}, {None}),
        (
            {
                "/boot/grub/grub.cfg": "menuentry a { configfile /b.cfg; }",
                "/b.cfg": GRUB.replace("DEFAULT", "0"),
            },
            {"subvol=@"},
        ),
        ({"/boot/loader/entries/a.conf": ENTRY.format("a", "root")}, {"subvol=root"}),
        (
            {f"/boot/loader/entries/{name}.conf": ENTRY.format(name, name) for name in "ab"},
            {"subvol=a", "subvol=b"},
        ),
        (
            {
                "/boot/extlinux/extlinux.conf": "DEFAULT l\nLABEL l\n LINUX /v\n"
                f" APPEND {HERE} rootflags=subvolid=300\n"
            },
            {"subvolid=300"},
        ),
        ({"/etc/kernel/cmdline": f"{HERE} rootflags=subvol=@\n"}, {"subvol=@"}),
        ({"/etc/default/grub": "GRUB_CMDLINE_LINUX=quiet\n"}, set()),
        ({}, set()),
    ],
)
def test_a_menu(files: Tree, named: set[str | None], tmp_path: Path) -> None:
    """The entry that boots by default decides; entries for other filesystems do not count."""
    make_tree(tmp_path, {"/etc/os-release": OS_RELEASE, **files})
    reader = LocalFilesystem(tmp_path)
    assert named_subvolumes(reader, "", lambda device: device == "UUID=another") == named


def test_paths_of_a_menu_lead_into_the_root_that_only_the_command_line_names(
    tmp_path: Path,
) -> None:
    """GRUB counts them from above the subvolumes, and fstab names none for the root."""
    files: Tree = {
        "/boot/efi/EFI/debian/grub.cfg": "configfile ($root)/@/boot/grub/grub.cfg\n",
        "/boot/grub/grub.cfg": "source /@/boot/grub/more.cfg\n"
        f"menuentry a {{ linux /v {HERE}; }}\n",
        "/boot/grub/more.cfg": "set more=1\n",
        "/etc/fstab": f"UUID={UUID} / btrfs defaults 0 0\n",
    }
    reader = LocalFilesystem(make_tree(tmp_path, files))
    assert [menu.doubt for menu in read_boot_menus(reader, "@")] == ["", ""]
    assert any(menu.doubt for menu in read_boot_menus(reader))
