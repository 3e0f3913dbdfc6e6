"""Which entry of a boot menu starts the guest, and with which ``init=``."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import OS_RELEASE, Link, Tree, elf, make_tree
from vmprovision.errors import AmbiguousInitError
from vmprovision.filesystem import LocalFilesystem
from vmprovision.inspection.bootmenu import init_option, read_boot_menus

if TYPE_CHECKING:
    from pathlib import Path

SYSTEMD, RUNIT = "/lib/systemd/systemd", "/sbin/runit-init"
# Three init systems: /sbin/init is sysvinit's.
THREE: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/etc/inittab": "l2:2:wait:/etc/init.d/rc 2\n",
    "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
    SYSTEMD: elf(),
    RUNIT: elf(),
    "/etc/runit/runsvdir/default": None,
    "/bin/sh": elf(),
    "/usr/bin/python3": elf(),
}
# As update-grub writes it where several init systems are installed.
GRUB = f"""\
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
else
   set default="DEFAULT"
fi
function savedefault {{
  save_env saved_entry
}}
menuentry 'Debian' --class debian $menuentry_id_option 'gnulinux-simple-1' {{
\tlinux /vmlinuz root=/dev/vda1 ro quiet
}}
submenu 'Advanced options' $menuentry_id_option 'advanced' {{
\tmenuentry 'Debian, with systemd' $menuentry_id_option 'with-systemd' {{
\t\tlinux /vmlinuz root=/dev/vda1 ro init={SYSTEMD}
\t}}
\tmenuentry 'Debian, with runit' $menuentry_id_option 'with-runit' {{
\t\tlinux /vmlinuz root=/dev/vda1 ro init={RUNIT}
\t}}
}}
menuentry 'UEFI Firmware Settings' {{
\tfwsetup
}}
"""
LEGACY = f"default DEFAULT\ntitle A\nkernel /v root=x\ntitle B\nkernel /v init={SYSTEMD} x\n"
EXTLINUX = (
    "LABEL a\n LINUX /v\n APPEND root=x\nLABEL b\nMARK LINUX /v\n APPEND root=x init=" + RUNIT
)
ENTRIES: Tree = {
    "/boot/loader/entries/a-1.conf": f"title A\nlinux /v\noptions root=x init={SYSTEMD}\n",
    "/boot/loader/entries/b-2.conf": "title B\nlinux /v\noptions root=x $kernelopts\n",
}


def grub(default: str, **more: str) -> Tree:
    """A guest with GRUB whose default is this."""
    return {"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", default), **more}


def environment(text: str, folder: str = "grub") -> Tree:
    """A guest with this in grubenv."""
    return {f"/boot/{folder}/grubenv": f"# GRUB Environment Block\n{text}\n#####"}


@pytest.mark.parametrize(
    ("files", "program"),
    [
        (grub("0"), "sysvinit"),
        (grub("1>0"), "systemd"),
        (grub("advanced>with-runit"), "runit"),
        (grub("Advanced options>Debian, with systemd"), "systemd"),
        (grub("${saved_entry}"), "sysvinit"),
        ({**grub("${saved_entry}"), **environment("saved_entry=1>1")}, "runit"),
        ({**grub("0"), **environment("next_entry=1>1")}, "sysvinit"),
        ({"/boot/grub/menu.lst": LEGACY.replace("DEFAULT", "0")}, "sysvinit"),
        ({"/boot/grub/grub.conf": LEGACY.replace(" DEFAULT", "=1")}, "systemd"),
        ({"/boot/extlinux/extlinux.conf": "DEFAULT a\n" + EXTLINUX}, "sysvinit"),
        ({"/boot/extlinux/extlinux.conf": "DEFAULT b\n" + EXTLINUX}, "runit"),
        ({"/boot/extlinux.conf": "DEFAULT menu.c32\n" + EXTLINUX}, "sysvinit"),
        (
            {"/extlinux.conf": "DEFAULT menu.c32\n" + EXTLINUX.replace("MARK", " MENU DEFAULT\n")},
            "runit",
        ),
        ({"/boot/syslinux/syslinux.cfg": f"APPEND init={RUNIT}\nLABEL a\n LINUX /v\n"}, "runit"),
        ({**ENTRIES, "/boot/loader/loader.conf": "default a-*\n"}, "systemd"),
        ({**ENTRIES, **environment("saved_entry=b-2", "grub2")}, "sysvinit"),
        (
            {**ENTRIES, **environment(f"saved_entry=b-2\nkernelopts=ro init={RUNIT}", "grub2")},
            "runit",
        ),
        ({"/etc/default/grub": f'GRUB_CMDLINE_LINUX="quiet init={SYSTEMD}"\n'}, "systemd"),
        ({"/etc/default/grub": f'#GRUB_CMDLINE_LINUX="init={SYSTEMD}"\n'}, "sysvinit"),
        ({"/etc/kernel/cmdline": f"root=x init={RUNIT}\n"}, "runit"),
        ({**grub("0"), "/etc/default/grub": f'GRUB_CMDLINE_LINUX="init={SYSTEMD}"\n'}, "sysvinit"),
        ({"/boot/efi/EFI/fedora/grub.cfg": GRUB.replace("DEFAULT", "1>1")}, "runit"),
        # two loaders, one answer
        ({**grub("0"), "/boot/grub/menu.lst": "title A\nkernel /v init=/sbin/init\n"}, "sysvinit"),
    ],
)
def test_the_default_entry_decides(files: Tree, program: str, tmp_path: Path) -> None:
    """By number, title or identifier, through submenus, as it was saved, or the first."""
    guest = vmprovision.inspect(make_tree(tmp_path, {**THREE, **files}))
    assert guest.init.pid1 == program
    assert guest.init.system == {"sysvinit": "sysv"}.get(program, program)


@pytest.mark.parametrize(
    "files",
    [
        grub("an entry that is gone"),
        {"/boot/grub/menu.lst": LEGACY.replace("DEFAULT", "saved")},
        ENTRIES,
        {**grub("0"), "/boot/grub/menu.lst": f"title A\nkernel /v init={SYSTEMD}\n"},
    ],
)
def test_a_menu_that_does_not_decide_is_never_guessed(files: Tree, tmp_path: Path) -> None:
    """Entries or loaders that differ, and no telling which is used: exit 33, naming --init."""
    make_tree(tmp_path, {**THREE, **files})
    with pytest.raises(AmbiguousInitError, match="do not agree") as caught:
        vmprovision.plan(tmp_path)
    assert "--init" in caught.value.hint
    told = vmprovision.InjectOptions(init="sysv")
    assert vmprovision.plan(tmp_path, told).guest.init.system == "sysv"


def test_entries_that_agree_need_no_default(tmp_path: Path) -> None:
    """Where every kernel is started with the same init=, it does not matter which boots."""
    entry = "title {0}\nlinux /v\noptions root=x init=" + RUNIT + "\n"
    files: Tree = {f"/boot/loader/entries/{n}.conf": entry.format(n) for n in "ab"}
    assert vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init.system == "runit"


def test_other_programs_of_the_firmware_are_no_entries(tmp_path: Path) -> None:
    """A memory test beside the kernel's entries has no say in which init starts."""
    files: Tree = {
        "/boot/loader/entries/a.conf": f"title A\nlinux /v\noptions root=x init={RUNIT}\n",
        "/boot/loader/entries/memtest.conf": "title memtest86+\nefi /memtest.efi\n",
    }
    assert vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init.system == "runit"


def test_a_circle_of_links_is_no_menu(tmp_path: Path) -> None:
    """It boots nothing, and the guest is judged by the rest."""
    files: Tree = {"/boot/grub": Link("grub2"), "/boot/grub2": Link("grub")}
    assert vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init.system == "sysv"


def test_the_last_option_of_a_command_line_counts() -> None:
    """As in the kernel; rdinit= is another option, and a relative path none."""
    assert init_option("init=/a rdinit=/b init=/c quiet") == PurePosixPath("/c")
    assert init_option("rdinit=/b init=c") is None


def test_a_hostile_menu_ends_soon(tmp_path: Path) -> None:
    """Submenus without an end, and braces without number, are not followed."""
    text = "submenu 'a' {\n" * 60_000 + "{\n" * 60_000
    make_tree(tmp_path, {**THREE, "/boot/grub/grub.cfg": text})
    assert read_boot_menus(LocalFilesystem(tmp_path)) == []
