"""Find what boots a guest: a given kernel, its own boot loader, or its own kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.partitions import (
    EFI_SYSTEM_TYPES,
    HEAD_SIZE,
    SECTOR,
    UnclearLayoutError,
    parse_partitions,
)
from vmprovision.disklayout.subvolumes import split_subvolume
from vmprovision.errors import PlanError, ProofError, printable
from vmprovision.filesystem.deployment import DeployedFilesystem, disk_path
from vmprovision.inspection.boot import (
    GRUB,
    expects_classic_names,
    find_boot_loader,
    find_uefi_loader,
)
from vmprovision.inspection.bootmenu.files import MenuFiles
from vmprovision.inspection.kernelfile import kernel_architecture
from vmprovision.inspection.ostree import find_boot_files
from vmprovision.proof.machine.options import HARDWARE, BootSource

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.appliance.session import Appliance
    from vmprovision.disklayout.partitions import Partition
    from vmprovision.inspection.boot import BootLoader, Firmware
    from vmprovision.inspection.bootmenu import BootEntry
    from vmprovision.target import OpenDisks

DISK = "/dev/sda"  # the guest's only one
COVERED = ("/etc", "/boot")  # a root has the first, the disk of an OSTree guest the second
FIRMWARE_NAMES: dict[Firmware, str] = {"bios": "a PC's BIOS", "uefi": "UEFI"}
BOOT_FILE_LIMIT = 512 << 20
PC = ("x86_64", "i386")
# Linux panics if its timer seems to tick too rarely, which it does on a busy host without KVM.
NO_TIMER_CHECK = " no_timer_check"


@dataclass(frozen=True, slots=True, kw_only=True)
class BootStart:
    """What boots a guest: its name for people, and the machine's architecture."""

    source: BootSource
    name: str
    arch: str


def parse_firmware(name: str | None) -> Firmware | None:
    """Return the firmware for a value of ``--firmware``.

    Raises:
        PlanError: there is no such firmware.
    """
    found = next((each for each in FIRMWARE_NAMES if each == name), None)
    if name is not None and found is None:
        raise PlanError(
            f"there is no firmware {name}", hint=f"--firmware takes {', '.join(FIRMWARE_NAMES)}"
        )
    return found


def find_start(
    opened: OpenDisks,
    folder: Path,
    *,
    kernel: Path | None = None,
    initrd: Path | None = None,
    firmware: Firmware | None = None,
) -> BootStart:
    """Return the caller's kernel; else the image's own boot loader, else its own kernel.

    Args:
        opened: the guest, mounted in an appliance.
        folder: gets the guest's kernel and initrd, if they are needed.
        kernel: the caller's kernel, if there is one.
        initrd: the initrd that belongs to it.
        firmware: the firmware that must start the image's own boot loader, if the caller
            chose one.

    Raises:
        ProofError: none of the three exists, the chosen firmware finds no boot loader, or a
            boot entry names a file that does not exist.
    """
    guest, appliance = opened.guest, opened.appliance
    if kernel:
        return _start_kernel("given kernel", (kernel, initrd), opened)
    loader = _find_loader(opened, firmware)
    if loader is None and firmware is not None:
        raise ProofError(
            f"the image has no boot loader that {FIRMWARE_NAMES[firmware]} starts",
            hint="leave out --firmware, and the image starts by what it has",
        )
    if loader is not None and (loader.needs == "bios" or loader.firmware is not None):
        source = BootSource(firmware=loader.firmware, display=loader.name == GRUB)
        return BootStart(source=source, name=f"boot loader ({loader.name})", arch=guest.arch)
    if firmware is not None:
        raise ProofError(
            f"this host has no UEFI firmware for {guest.arch}",
            hint="install it: on Debian the package ovmf, or qemu-efi-aarch64 for 64-bit ARM",
        )
    if entry := _find_entry(opened):
        return _start_entry(entry, folder, opened)
    if not guest.kernels:
        raise ProofError(
            "the image has neither a boot loader nor a kernel in /boot",
            hint="give a kernel with --kernel and --initrd",
        )
    own = guest.kernels[0]
    files = folder / "kernel", folder / "initrd" if own.initrd else None
    _fetch(appliance, str(own.path), files[0])
    if own.initrd and files[1]:
        _fetch(appliance, str(own.initrd), files[1])
    return _start_kernel(f"own kernel ({own.version or own.path.name})", files, opened)


def _find_entry(opened: OpenDisks) -> BootEntry | None:
    """Return the entry that boots an OSTree guest; only its options name the deployment."""
    files = opened.mounted.filesystem
    return find_boot_files(files) if isinstance(files, DeployedFilesystem) else None


def _start_entry(entry: BootEntry, folder: Path, opened: OpenDisks) -> BootStart:
    """Return how to start what an entry of the Boot Loader Specification names."""
    kernel, initrd = folder / "kernel", folder / "initrd" if entry.initrd else None
    _fetch_named(entry, entry.kernel, kernel, opened)
    if initrd:
        _fetch_named(entry, entry.initrd, initrd, opened)
    return _start_kernel(f"own kernel (entry {printable(entry.name)})", (kernel, initrd), opened)


def _fetch_named(entry: BootEntry, path: str, target: Path, opened: OpenDisks) -> None:
    """Fetch a file by the boot loader's path of it.

    Raises:
        ProofError: it does not exist.
    """
    files = opened.mounted.filesystem
    real = MenuFiles(files).find(path)
    if real is None:
        raise ProofError(
            f"the boot entry {printable(entry.name)} names {printable(path)}, which does not exist",
            hint="give a kernel with --kernel and --initrd",
        )
    _fetch(opened.appliance, str(disk_path(files, real)), target)


def _find_loader(opened: OpenDisks, firmware: Firmware | None) -> BootLoader | None:
    """Return the image's own boot loader, also on an EFI system partition beside fstab."""
    head, arch = opened.appliance.read_device(DISK, 0, HEAD_SIZE), opened.guest.arch
    loader = find_boot_loader(head[:SECTOR], opened.mounted.filesystem, arch, firmware)
    if loader is not None or firmware == "bios":
        return loader
    try:
        partitions = parse_partitions(head)
    except UnclearLayoutError:
        return None
    systems = [each for each in partitions if each.kind in EFI_SYSTEM_TYPES]
    found = (_look_into_system(opened.appliance, each, arch) for each in systems)
    return next(filter(None, found), None)


def _look_into_system(appliance: Appliance, system: Partition, arch: str) -> BootLoader | None:
    """Return what UEFI starts from a partition.

    It covers a directory of the guest for a moment, because the guest may be read-only.
    """
    place = next((path for path in COVERED if appliance.call("is_dir", path)), None)
    if place is None:
        return None
    try:
        appliance.mount(f"{DISK}{system.number}", "vfat", place, readonly=True)
    except ApplianceCallError:  # no filesystem, or one that is damaged
        return None
    loader = find_uefi_loader(ApplianceFilesystem(appliance), arch, [PurePosixPath(place)])
    appliance.unmount(place)
    return loader


def _start_kernel(name: str, files: tuple[Path, Path | None], opened: OpenDisks) -> BootStart:
    """Return how to start a kernel and its initrd on the board of the kernel's architecture."""
    kernel, initrd = files
    arch = kernel_architecture(kernel) or opened.guest.arch
    entry = _find_entry(opened)
    command_line = (
        printable(entry.options) if entry else f"root={_kernel_root(_root_device(opened))} ro"
    )
    if arch in HARDWARE:
        command_line += f" console={HARDWARE[arch].console}"
    if arch in PC:
        command_line += NO_TIMER_CHECK
    if expects_classic_names(opened.mounted.filesystem):
        command_line += " net.ifnames=0"
    source = BootSource(kernel=kernel, initrd=initrd, command_line=command_line)
    return BootStart(source=source, name=name, arch=arch)


def _fetch(appliance: Appliance, guest_path: str, target: Path) -> None:
    if appliance.call("filesize", guest_path) > BOOT_FILE_LIMIT:
        raise ProofError(f"guest file {guest_path} is too large to be a kernel or an initrd")
    appliance.call("download", guest_path, str(target))


def _root_device(opened: OpenDisks) -> str:
    """Return the device whose root boots; a new snapshot boots as the default subvolume."""
    device = opened.mounted.root.device
    return split_subvolume(device)[0] if opened.mounted.snapshot else device


def _kernel_root(device: str) -> str:
    """Return the guest kernel's name of the root device on a virtio disk."""
    if match := re.fullmatch(r"/dev/sda(\d*)", device):
        return f"/dev/vda{match[1]}"
    if device.startswith("btrfsvol:"):
        _, _, disk, subvolume = device.removeprefix("btrfsvol:").split("/", 3)
        return f"{_kernel_root('/dev/' + disk)} rootflags=subvol={subvolume}"
    return device
