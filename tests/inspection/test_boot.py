"""Does an image start by itself, and what does its kernel have to be told?"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from tests.conftest import require
from tests.trees import Tree, make_tree
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.boot import UEFI, BootLoader, expects_classic_names, find_boot_loader
from vmprovision.inspection.kernelfile import kernel_architecture
from vmprovision.inspection.layout import find_kernels
from vmprovision.runtime.store import host_architecture

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


@pytest.mark.parametrize(("arch", "folder"), [("x86_64", "/boot/efi"), ("aarch64", "/efi")])
def test_uefi_starts_the_program_of_its_own_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, folder: str
) -> None:
    """Each architecture has its own firmware, and its own name for the program."""
    firmware = tmp_path / "firmware"
    firmware.touch()
    program, _ = UEFI[arch]
    monkeypatch.setitem(UEFI, arch, (program, (str(firmware),)))
    guest = LocalFilesystem(make_tree(tmp_path / "guest", {f"{folder}/EFI/BOOT/{program}": "MZ"}))
    loader = find_boot_loader(NO_CODE, guest, arch)
    assert loader is not None
    assert loader.firmware == firmware
    assert find_boot_loader(NO_CODE, guest, "s390x") is None


def test_the_wanted_firmware_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud image starts by a PC's BIOS and by UEFI; the BIOS is the first choice."""
    firmware = tmp_path / "firmware"
    firmware.touch()
    # a FAT has no capitals of its own, and openSUSE writes its names in small letters
    files: Tree = {"/boot/efi/EFI/boot/bootx64.efi": "MZ"}
    monkeypatch.setitem(UEFI, "x86_64", ("BOOTX64.EFI", (str(firmware),)))
    guest = LocalFilesystem(make_tree(tmp_path / "guest", files))
    found = {
        wanted: find_boot_loader(GRUB_CODE, guest, firmware=wanted)
        for wanted in (None, "bios", "uefi")
    }
    assert found == {
        None: BootLoader(name="GRUB", needs="bios"),
        "bios": BootLoader(name="GRUB", needs="bios"),
        "uefi": BootLoader(name="UEFI", needs="uefi", firmware=firmware),
    }
    assert find_boot_loader(NO_CODE, guest, firmware="bios") is None


def marked(place: int, mark: bytes, size: int = 0x400) -> bytes:
    """Return bytes with a mark at a place."""
    content = bytearray(max(size, place + len(mark)))
    content[place : place + len(mark)] = mark
    return bytes(content)


PE = b"MZ" + bytes(0x3A) + b"\x40\0\0\0" + b"PE\0\0"


@pytest.mark.parametrize(
    ("head", "arch"),
    [
        (marked(0x202, b"HdrS" + bytes(0x30) + b"\x3f\0"), "x86_64"),
        (marked(0x202, b"HdrS" + bytes(0x30) + b"\x3e\0"), "i386"),
        (marked(0x38, b"ARM\x64"), "aarch64"),
        (marked(0x38, b"RSC\x05"), "riscv64"),
        (marked(0x24, b"\x18\x28\x6f\x01"), "armv7l"),
        (marked(0x10008, b"S390EP"), "s390x"),
        (PE + b"\x64\xaa", "aarch64"),
        (gzip.compress(marked(0x38, b"ARM\x64", 1 << 20))[:600], "aarch64"),
        (b"\x1f\x8b" + b"damaged", None),
        (b"MZ", None),
        (b"", None),
    ],
)
def test_a_kernel_says_what_it_is_for(tmp_path: Path, head: bytes, arch: str | None) -> None:
    """A 64-bit kernel boots 32-bit guests, so its file decides which machine boots it."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(head)
    assert kernel_architecture(kernel) == arch


def test_this_host_s_kernel_is_for_this_host() -> None:
    """The rules hold for a kernel as its distribution installed it."""
    kernels = [path for path in Path("/boot").glob("vmlinu[xz]-*") if os.access(path, os.R_OK)]
    require(kernels, "no kernel in /boot can be read")
    assert {kernel_architecture(path) for path in kernels} == {host_architecture()}


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
