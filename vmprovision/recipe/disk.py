"""Lay out the disk of a new guest in the appliance, and install its boot loader.

A guest with GRUB gets the disk of a cloud image, in the order of Red Hat's: a BIOS boot
partition, an EFI system partition, perhaps a ``/boot``, and the root. GRUB's own programs
install it, out of the guest's packages: in the appliance, never on this host.
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
LVM = "E6D6D379-F507-44C2-A23C-238F2A3DF928"
BIOS_BOOT_MB = 1
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
    sizes = [(BIOS_BOOT, BIOS_BOOT_MB), (EFI_SYSTEM, EFI_SYSTEM_MB)]
    sizes += [("", layout.boot_mb)] if layout.boot_mb else []
    sizes += [(LVM if layout.volume_group else "", 0)]  # the rest of the disk
    appliance.call("part_init", DISK, layout.partition_table)
    first = FIRST_SECTOR
    for number, (kind, size) in enumerate(sizes, start=1):
        last = first + size * SECTORS_OF_MB - 1 if size else LAST_SECTOR
        appliance.call("part_add", DISK, "primary", first, last)
        if kind:
            appliance.call("part_set_gpt_type", DISK, number, kind)
        first = last + 1
    root = f"{DISK}{len(sizes)}"
    if group := layout.volume_group:
        appliance.call("pvcreate", root)
        appliance.call("vgcreate", group, [root])
        appliance.call("lvcreate_free", "root", group, 100)
        root = f"/dev/{group}/root"
    _mount_root(appliance, layout, root)
    if layout.boot_mb:
        appliance.call("mkfs", "ext4", f"{DISK}3", label="BOOT")
        _mount_below(appliance, f"{DISK}3", "/boot")
    appliance.call("mkfs", "vfat", f"{DISK}2", label="UEFI")
    _mount_below(appliance, f"{DISK}2", "/boot/efi")


def _mount_root(appliance: Appliance, layout: DiskLayout, device: str) -> None:
    is_ext = layout.filesystem.startswith("ext")
    features = ",".join(layout.features) if is_ext else None
    appliance.call("mkfs", layout.filesystem, device, features=features or None)
    appliance.call("set_uuid", device, layout.uuid)
    appliance.call("mount", device, "/")
    if not layout.subvolumes:
        return
    place_of = dict(each.split(":", 1) for each in layout.subvolumes)
    for name in place_of:
        appliance.call("mkdir_p", f"/{name}".rpartition("/")[0] or "/")
        appliance.call("btrfs_subvolume_create", f"/{name}")
    appliance.call("umount_all")
    for name, place in sorted(place_of.items(), key=lambda item: item[1]):
        _mount_below(appliance, device, place, f"subvol={name}")


def _mount_below(appliance: Appliance, device: str, place: str, options: str = "") -> None:
    if place != "/":
        appliance.call("mkdir_p", place)
    appliance.call("mount_options", options, device, place)


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
