"""Lay out the disk of a new guest in the appliance, and install its boot loader.

A guest with GRUB gets the disk of a cloud image, in the order of Red Hat's: a BIOS boot
partition, an EFI system partition, and the root. GRUB's own programs install it, out of
the guest's packages: in the appliance, never on this host.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.appliance.session import ApplianceCallError
from vmprovision.errors import RecipeError

if TYPE_CHECKING:
    from vmprovision.appliance.session import Appliance
    from vmprovision.recipe.schema import DiskLayout, Recipe

DISK = "/dev/sda"
SECTORS_OF_MB = 2048
FIRST_SECTOR = SECTORS_OF_MB  # 1 MiB, the usual alignment
# a GPT has a second copy in the disk's last 33 sectors
LAST_SECTOR = -SECTORS_OF_MB
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
EFI_SYSTEM = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
EFI_SYSTEM_MB = 64

BOOT_CODE_BYTES = 440  # the rest of the first sector is the partition table
BOOT_CODE_FILES = (
    Path("/usr/lib/syslinux/mbr/mbr.bin"),
    Path("/usr/lib/EXTLINUX/mbr.bin"),
    Path("/usr/share/syslinux/mbr.bin"),
)
EXTLINUX_FOLDER = "/boot/extlinux"
EXTLINUX_CONF = """\
# Starts at once; the kernel's packages keep /vmlinuz and /initrd.img up to date.
default linux
prompt 0
timeout 0
label linux
  linux /vmlinuz
  initrd /initrd.img
  append {command_line}
"""
GRUB_SECONDS = 900.0
GRUB_DEFAULTS = "/etc/default/grub.d/recipe.cfg"
# as the package grub-cloud-amd64 installs it in Debian's cloud images
GRUB_FOR_BIOS = ("grub-install", "--target=i386-pc")
GRUB_FOR_UEFI = (
    *("grub-install", "--target=x86_64-efi", "--no-nvram"),
    *("--uefi-secure-boot", "--force-extra-removable"),
)


def mount_new_filesystems(appliance: Appliance, layout: DiskLayout) -> None:
    """Make a guest's partitions and filesystems, and mount them where the guest has them."""
    if layout.bootloader == "grub":
        _mount_cloud_disk(appliance, layout)
        return
    root = DISK if layout.partition_table == "none" else f"{DISK}1"
    if layout.partition_table != "none":
        appliance.call("part_init", DISK, layout.partition_table)
        appliance.call("part_add", DISK, "primary", FIRST_SECTOR, LAST_SECTOR)
    _mount_root(appliance, layout, root)


def install_boot_loader(appliance: Appliance, recipe: Recipe) -> None:
    """Install the recipe's boot loader in the mounted guest.

    Raises:
        RecipeError: this host or the guest lacks its programs, or they failed.
    """
    if recipe.disk.bootloader == "extlinux":
        _install_extlinux(appliance, recipe.disk.command_line)
        return
    try:
        _install_grub(appliance, recipe.disk.command_line)
    except ApplianceCallError as exc:
        raise RecipeError(
            f"recipe {recipe.name}: GRUB cannot be installed: {exc.message}",
            hint="add the package grub-cloud-amd64 to the recipe's packages",
        ) from exc


def _install_grub(appliance: Appliance, command_line: str) -> None:
    defaults = f'GRUB_CMDLINE_LINUX="{command_line}"\n'
    appliance.call("mkdir_p", GRUB_DEFAULTS.rpartition("/")[0])
    appliance.call("write", GRUB_DEFAULTS, defaults.encode())
    # the guest's programs see the kernel's name of the disk, which may differ from libguestfs's
    disk = appliance.call("command", ["grub-probe", "--target=disk", "/boot"]).strip()
    for command in ([*GRUB_FOR_BIOS, disk], [*GRUB_FOR_UEFI], ["update-grub"]):
        appliance.call("command", command, limit=GRUB_SECONDS)


def _mount_cloud_disk(appliance: Appliance, layout: DiskLayout) -> None:
    appliance.call("part_init", DISK, layout.partition_table)
    first = FIRST_SECTOR
    for number, (kind, size) in enumerate(((BIOS_BOOT, 1), (EFI_SYSTEM, EFI_SYSTEM_MB)), start=1):
        last = first + size * SECTORS_OF_MB - 1
        appliance.call("part_add", DISK, "primary", first, last)
        appliance.call("part_set_gpt_type", DISK, number, kind)
        first = last + 1
    appliance.call("part_add", DISK, "primary", first, LAST_SECTOR)
    _mount_root(appliance, layout, f"{DISK}3")
    appliance.call("mkfs", "vfat", f"{DISK}2", label="UEFI")
    appliance.call("mkdir_p", "/boot/efi")
    appliance.call("mount", f"{DISK}2", "/boot/efi")


def _mount_root(appliance: Appliance, layout: DiskLayout, device: str) -> None:
    appliance.call("mkfs", layout.filesystem, device, features=",".join(layout.features) or None)
    appliance.call("set_uuid", device, layout.uuid)
    appliance.call("mount", device, "/")


def _install_extlinux(appliance: Appliance, command_line: str) -> None:
    code = next((path for path in BOOT_CODE_FILES if path.exists()), None)
    if code is None or not appliance.call("feature_available", ["extlinux"]):
        raise RecipeError(
            "the boot loader extlinux is not installed on this host",
            hint="install the packages extlinux and syslinux-common",
        )
    appliance.call("mkdir_p", EXTLINUX_FOLDER)
    configuration = EXTLINUX_CONF.format(command_line=command_line)
    appliance.call("write", f"{EXTLINUX_FOLDER}/extlinux.conf", configuration.encode())
    appliance.call("extlinux", EXTLINUX_FOLDER)
    appliance.call("pwrite_device", DISK, code.read_bytes()[:BOOT_CODE_BYTES], 0)
    appliance.call("part_set_bootable", DISK, 1, True)  # noqa: FBT003 -- libguestfs's signature
