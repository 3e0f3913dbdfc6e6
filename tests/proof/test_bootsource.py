"""Where a proof finds the boot loader of an image."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.trees import elf, make_tree
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.errors import ProofError
from vmprovision.inspection.boot import UEFI
from vmprovision.progress import Control
from vmprovision.proof.bootsource import find_start
from vmprovision.proof.machine import BootSource
from vmprovision.reports import ImageOptions
from vmprovision.target import Access, open_guest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

BIOS_BOOT, EFI_SYSTEM, ROOT = 1, 2, 3
SECTORS_OF_MB = 2048


def make_disk(folder: Path) -> Path:
    """Return a disk as a cloud image has it, whose fstab names only the root."""
    tree = make_tree(
        folder / "tree",
        {
            "/etc/os-release": "ID=debian\n",
            "/etc/fstab": "/dev/vda3 / ext4 defaults 0 1\n",
            "/usr/lib/systemd/systemd": elf(),
            "/sbin/init": elf(),
        },
    )
    tar, disk = folder / "tree.tar", folder / "disk.qcow2"
    subprocess.run(["tar", "-cf", str(tar), "-C", str(tree), "."], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("part_init", "/dev/sda", "gpt")
        for first, last in ((1, 2), (2, 20), (20, 62)):
            sectors = first * SECTORS_OF_MB, last * SECTORS_OF_MB - 1
            appliance.call("part_add", "/dev/sda", "primary", *sectors)
        guid = "21686148-6449-6E6F-744E-656564454649"
        appliance.call("part_set_gpt_type", "/dev/sda", BIOS_BOOT, guid)
        guid = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
        appliance.call("part_set_gpt_type", "/dev/sda", EFI_SYSTEM, guid)
        appliance.call("mkfs", "vfat", f"/dev/sda{EFI_SYSTEM}")
        appliance.call("mount", f"/dev/sda{EFI_SYSTEM}", "/")
        appliance.call("mkdir_p", "/EFI/BOOT")
        appliance.call("write", "/EFI/BOOT/BOOTX64.EFI", b"MZ")
        appliance.call("umount_all")
        appliance.call("mkfs", "ext4", f"/dev/sda{ROOT}")
        appliance.call("mount", f"/dev/sda{ROOT}", "/")
        appliance.call("tar_in", str(tar), "/")
        appliance.call("umount_all")
    return disk


def test_uefi_needs_no_fstab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UEFI finds its partition by the type, so an image that mounts it nowhere starts as well."""
    firmware = tmp_path / "firmware"
    firmware.touch()
    monkeypatch.setitem(UEFI, "x86_64", ("BOOTX64.EFI", (str(firmware),)))
    access = Access(source=ImageOptions(), control=Control())
    drive = Drive(path=make_disk(tmp_path), format="qcow2", readonly=True)
    with open_guest([drive], access, write=False) as opened:
        assert str(EFI_SYSTEM) not in "".join(opened.mounted.mountpoints.values())
        for wanted in (None, "uefi"):
            start = find_start(opened, tmp_path, firmware=wanted)
            assert start.source == BootSource(firmware=firmware)
        assert opened.appliance.call("is_file", "/etc/fstab")
        with pytest.raises(ProofError, match="no boot loader that a PC's BIOS starts"):
            find_start(opened, tmp_path, firmware="bios")
