"""Find the image's boot loader, by its first sector and its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import read_text, status_of
from vmprovision.guest.shelltext import without_comments

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader

SYSLINUX_FOLDERS = ("/boot/extlinux", "/extlinux", "/boot/syslinux", "/syslinux", "/boot", "/")
EFI_FOLDERS = ("/boot/efi/EFI/BOOT", "/efi/EFI/BOOT", "/boot/EFI/BOOT")
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
    """A boot loader in the image, and the firmware that it needs if not a PC's BIOS."""

    name: str
    firmware: Path | None = None


def find_boot_loader(
    first_sector: bytes, reader: GuestReader, arch: str = "x86_64"
) -> BootLoader | None:
    """Return the boot loader that a machine would start from this disk, or None.

    A PC's BIOS is tried first, because such a disk starts everywhere.  Boot code alone
    proves nothing: partitioning tools write code that only looks for an active partition.

    Args:
        first_sector: the disk's first sector.
        reader: the guest's files.
        arch: the architecture of the guest's kernel.
    """
    if arch in PC and b"GRUB" in first_sector[BOOT_CODE]:
        return BootLoader(name="GRUB")
    if arch in PC and any(first_sector[BOOT_CODE]):
        for folder in SYSLINUX_FOLDERS:
            if status_of(reader, PurePosixPath(folder) / "ldlinux.sys") is not None:
                return BootLoader(name="syslinux")
    program, files = UEFI.get(arch, ("", ()))
    firmware = next((Path(path) for path in files if Path(path).is_file()), None)
    for folder in EFI_FOLDERS:
        if firmware and status_of(reader, PurePosixPath(folder) / program) is not None:
            return BootLoader(name="UEFI", firmware=firmware)
    return None


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
