"""Find what boots a guest: a given kernel, its own boot loader, or its own kernel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmprovision.errors import ProofError
from vmprovision.inspection.boot import expects_classic_names, find_boot_loader
from vmprovision.proof.machine.options import BootSource

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.appliance.session import Appliance
    from vmprovision.target import OpenDisks

BOOT_FILE_LIMIT = 512 << 20


def find_boot_source(
    opened: OpenDisks, folder: Path, *, kernel: Path | None = None, initrd: Path | None = None
) -> tuple[BootSource, str]:
    """Return the caller's kernel; else the image's own boot loader, else its own kernel.

    Args:
        opened: the guest, mounted in an appliance.
        folder: gets the guest's kernel and initrd, if they are needed.
        kernel: the caller's kernel, if there is one.
        initrd: the initrd that belongs to it.

    Returns:
        The source, and its name in words.

    Raises:
        ProofError: there is none of the three.
    """
    guest, filesystem = opened.guest, opened.mounted.filesystem
    loader = find_boot_loader(opened.appliance.call("pread_device", "/dev/sda", 512, 0), filesystem)
    if loader is not None and not kernel:
        return BootSource(firmware=loader.firmware), f"boot loader ({loader.name})"
    command_line = f"root={_kernel_root(opened.mounted.root.device)} ro console=ttyS0"
    if expects_classic_names(filesystem):
        command_line += " net.ifnames=0"
    if kernel:
        return BootSource(kernel=kernel, initrd=initrd, command_line=command_line), "given kernel"
    if not guest.kernels:
        raise ProofError(
            "the image has neither a boot loader nor a kernel in /boot",
            hint="give a kernel with --kernel and --initrd",
        )
    own = guest.kernels[0]
    own_kernel, own_initrd = folder / "kernel", folder / "initrd" if own.initrd else None
    _fetch(opened.appliance, str(own.path), own_kernel)
    if own.initrd and own_initrd:
        _fetch(opened.appliance, str(own.initrd), own_initrd)
    return (
        BootSource(kernel=own_kernel, initrd=own_initrd, command_line=command_line),
        f"own kernel ({own.version or own.path.name})",
    )


def _fetch(appliance: Appliance, guest_path: str, target: Path) -> None:
    if appliance.call("filesize", guest_path) > BOOT_FILE_LIMIT:
        raise ProofError(f"guest file {guest_path} is too large to be a kernel or an initrd")
    appliance.call("download", guest_path, str(target))


def _kernel_root(device: str) -> str:
    """Return the name of the root device on a virtio disk, as the guest's kernel has it."""
    if match := re.fullmatch(r"/dev/sda(\d*)", device):
        return f"/dev/vda{match[1]}"
    if device.startswith("btrfsvol:"):
        _, _, disk, subvolume = device.removeprefix("btrfsvol:").split("/", 3)
        return f"{_kernel_root('/dev/' + disk)} rootflags=subvol={subvolume}"
    return device
