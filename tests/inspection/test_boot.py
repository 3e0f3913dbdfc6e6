"""Does an image start by itself, and what does its kernel have to be told?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.trees import Tree, make_tree
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.boot import expects_classic_names, find_boot_loader
from vmprovision.inspection.layout import find_kernels

if TYPE_CHECKING:
    from pathlib import Path

NO_CODE = bytes(510) + b"\x55\xaa"
SOME_CODE = b"\xfa\xb8\x00\x10" + bytes(506) + b"\x55\xaa"  # as partitioning tools write it
GRUB_CODE = b"\xeb\x63\x90" + bytes(380) + b"GRUB \0Geom" + bytes(117) + b"\x55\xaa"


@pytest.mark.parametrize(
    ("sector", "files", "name"),
    [
        (NO_CODE, {"/boot/extlinux/ldlinux.sys": "x"}, None),
        (SOME_CODE, {}, None),
        (SOME_CODE, {"/boot/extlinux/ldlinux.sys": "x"}, "syslinux"),
        (GRUB_CODE, {}, "GRUB"),
    ],
)
def test_boot_code_alone_is_no_boot_loader(
    tmp_path: Path, sector: bytes, files: Tree, name: str | None
) -> None:
    """Partitioning tools write boot code too; a loader has files or says its name."""
    loader = find_boot_loader(sector, LocalFilesystem(make_tree(tmp_path, files)))
    assert (loader.name if loader else None) == name


def test_kernels_are_found_newest_first_with_their_initrds(tmp_path: Path) -> None:
    """10 is newer than 9; a rescue kernel is the last resort; a dangling link is none."""
    names = ["vmlinuz-5.10.0-9-amd64", "initrd.img-5.10.0-9-amd64", "vmlinuz-5.10.0-10-amd64"]
    names += ["initrd.img-5.10.0-10-amd64", "vmlinuz-0-rescue-abc", "initramfs-0-rescue-abc.img"]
    names += ["System.map-5.10.0-9-amd64", "vmlinuz-4.1.0.old"]
    make_tree(tmp_path, {f"/boot/{name}": "x" for name in names})
    (tmp_path / "boot/vmlinuz-9.9").symlink_to("gone")
    found = find_kernels(LocalFilesystem(tmp_path))
    assert [kernel.version for kernel in found] == [
        "5.10.0-10-amd64",
        "5.10.0-9-amd64",
        "0-rescue-abc",
    ]
    assert [kernel.initrd is not None for kernel in found] == [True, True, True]


@pytest.mark.parametrize(
    ("files", "classic"),
    [
        ({"/etc/network/interfaces": "auto eth0\niface eth0 inet dhcp\n"}, True),
        ({"/etc/network/interfaces.d/cloud": "allow-hotplug eth0\n"}, True),
        ({"/etc/network/interfaces": "# auto eth0\nauto ens3\n"}, False),
        ({"/etc/systemd/network/80.network": "[Match]\nName=e*\n"}, False),
        ({}, False),
    ],
)
def test_a_guest_that_names_eth0_is_booted_with_that_name(
    tmp_path: Path,
    files: Tree,
    classic: bool,  # noqa: FBT001 -- a case of the table above
) -> None:
    """Otherwise its card would have another name, and no address."""
    guest = LocalFilesystem(make_tree(tmp_path, files))
    assert expects_classic_names(guest) is classic
