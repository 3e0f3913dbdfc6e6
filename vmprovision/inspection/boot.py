"""Find the image's boot loader, by its first sector and its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.filesystem.protocol import read_text, status_of
from vmprovision.guest.shelltext import without_comments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.filesystem.protocol import GuestReader

Firmware = Literal["bios", "uefi"]
GRUB = "GRUB"  # as a PC's BIOS starts it

SYSLINUX_FOLDERS = ("/boot/extlinux", "/extlinux", "/boot/syslinux", "/syslinux", "/boot", "/")
EFI_SYSTEMS = tuple(PurePosixPath(path) for path in ("/boot/efi", "/efi", "/boot"))
# architecture -> the program that UEFI starts from a disk, and UEFI for virtual machines as
# Debian, Ubuntu and Fedora install it
UEFI = {
    "x86_64": (
        "BOOTX64.EFI",
        (
            "/usr/share/OVMF/OVMF_CODE.fd",
            "/usr/share/OVMF/OVMF_CODE_4M.fd",
            "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        ),
    ),
    "aarch64": (
        "BOOTAA64.EFI",
        (
            "/usr/share/AAVMF/AAVMF_CODE.fd",
            "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw",
        ),
    ),
    "armv7l": ("BOOTARM.EFI", ("/usr/share/AAVMF/AAVMF32_CODE.fd",)),
    "riscv64": (
        "BOOTRISCV64.EFI",
        (
            "/usr/share/qemu-efi-riscv64/RISCV_VIRT_CODE.fd",
            "/usr/share/edk2/riscv/RISCV_VIRT_CODE.fd",
        ),
    ),
}
UEFI["i386"] = UEFI["x86_64"]  # 32-bit programs under a 64-bit kernel
PC = ("x86_64", "i386")
BOOT_CODE = slice(0, 440)
NETWORK_FILES = 100
NETWORK_FOLDERS = ("/etc/network/interfaces.d", "/etc/systemd/network", "/etc/netplan")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootLoader:
    """A boot loader in the image, and what starts it.

    Attributes:
        name: its name for people.
        needs: the firmware that starts it.
        firmware: UEFI of this host; None for a PC's BIOS, or if this host has none.
    """

    name: str
    needs: Firmware
    firmware: Path | None = None


def find_boot_loader(
    first_sector: bytes,
    reader: GuestReader,
    arch: str = "x86_64",
    firmware: Firmware | None = None,
) -> BootLoader | None:
    """Return the boot loader that a machine would start from this disk, or None.

    A PC's BIOS is tried first, because such a disk starts everywhere.

    Args:
        first_sector: the disk's first sector.
        reader: the guest's files.
        arch: the architecture of the guest's kernel.
        firmware: the machine's firmware, if only one counts.
    """
    loader = None
    if arch in PC and firmware != "uefi":
        loader = _bios_loader(first_sector, reader)
    if loader is None and firmware != "bios":
        loader = find_uefi_loader(reader, arch)
    return loader


def _bios_loader(first_sector: bytes, reader: GuestReader) -> BootLoader | None:
    """Return what a BIOS starts.

    Boot code alone proves nothing: partitioning tools write code that only looks for an
    active partition.
    """
    if b"GRUB" in first_sector[BOOT_CODE]:
        return BootLoader(name=GRUB, needs="bios")
    if any(first_sector[BOOT_CODE]):
        for folder in SYSLINUX_FOLDERS:
            if status_of(reader, PurePosixPath(folder) / "ldlinux.sys") is not None:
                return BootLoader(name="syslinux", needs="bios")
    return None


def find_uefi_loader(
    reader: GuestReader, arch: str, systems: Sequence[PurePosixPath] = EFI_SYSTEMS
) -> BootLoader | None:
    """Return what UEFI starts from a disk that it does not know.

    The names on a FAT are the same in capitals and small letters, but a reader that has
    listed a directory may tell them apart.

    Args:
        reader: the guest's files.
        arch: the architecture of the guest's kernel.
        systems: where EFI system partitions may be mounted.
    """
    program, files = UEFI.get(arch, ("", ()))
    firmware = next((Path(path) for path in files if Path(path).is_file()), None)
    for system in systems:
        for efi in _named(reader, system, "EFI"):
            for boot in _named(reader, efi, "BOOT"):
                if program and _named(reader, boot, program):
                    return BootLoader(name="UEFI", needs="uefi", firmware=firmware)
    return None


def _named(reader: GuestReader, folder: PurePosixPath, name: str) -> list[PurePosixPath]:
    """Return the entries of a directory with this name, in capitals or small letters."""
    names = reader.list_directory(folder)
    return [folder / each for each in names if each.upper() == name.upper()]


def expects_classic_names(reader: GuestReader) -> bool:
    """Return whether the guest's network configuration names its card ``eth0``.

    Such a guest expects ``net.ifnames=0`` (systemd.net-naming-scheme(7)). Its boot
    loader would pass that. Without a boot loader, the caller has to add it.
    """
    paths = [PurePosixPath("/etc/network/interfaces")]
    for folder in NETWORK_FOLDERS:
        names = reader.list_directory(PurePosixPath(folder))
        paths += [PurePosixPath(folder) / name for name in names[:NETWORK_FILES]]
    texts = [read_text(reader, path) or "" for path in paths]
    return any(re.search(r"\beth0\b", line) for text in texts for line in without_comments(text))
