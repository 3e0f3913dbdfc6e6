"""Mount the guest of a plain disk without a search: its first bytes say how it lies.

Plain is: no partition table, a GPT or an MBR of primaries; one Linux root on
ext2 to ext4 or XFS; beside it at most swap, ``/boot`` and ``/boot/efi``, boot
code, and filesystems that Linux does not boot from.  One look at the disk, one
mount, and a few files are then all it takes, a tenth of the search in
``roots``; whatever is not plain is left to that, and so is every refusal.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.appliance.devicenames import DeviceNames
from vmprovision.appliance.mounting import (
    ON_DEMAND,
    Mounting,
    blkid_tag,
    mount_root,
    unix_root,
    wanted_mounts,
)
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.errors import InspectionError
from vmprovision.partitions import BOOT_CODE_TYPES, UnclearLayoutError, parse_partitions
from vmprovision.superblocks import START_SIZE, identify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.appliance.filesystem import ApplianceFilesystem
    from vmprovision.appliance.mounting import MountedGuest, WantedMount
    from vmprovision.appliance.session import Appliance
    from vmprovision.partitions import Partition
    from vmprovision.superblocks import Superblock

log = logging.getLogger(__name__)

# Partitioning tools begin the first partition at one MiB: one reading serves it too.
FIRST_READING = (1 << 20) + START_SIZE
PARTITIONS = 8  # with more of them the search is hardly dearer
UNIX = ("ext", "xfs")
BLOCK = 4096  # the least that a filesystem may leave over; a RAID takes twice as much
MOUNTED_AS_ROOT = ("/", "/sysroot")  # the guest's own, or this one's: libguestfs made the image
# Without any of these names there is nothing that `recognise_system` would know.
OF_A_ROOT = frozenset(("bin", "etc", "gnu", "hurd", "nix", "ostree", "sbin", "usr"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Volume:
    """A partition, or the whole disk, and what is on it; boot code has no superblock."""

    device: str
    partition: Partition
    superblock: Superblock | None

    @property
    def is_unix(self) -> bool:
        """Whether a root of Linux may be on it."""
        return self.superblock is not None and self.superblock.kind in UNIX

    @property
    def driver(self) -> str:
        """The kernel's filesystem, where nothing else can be on it.

        One that leaves room at its partition's end may be a member of an old RAID,
        whose own superblock is there: mount(8) looks, and does not mount it.
        """
        block = self.superblock
        filled = block is not None and 0 <= self.partition.size - block.size < BLOCK
        return block.driver if block is not None and filled else ""


def mount_plain_guest(appliance: Appliance, disk: str, *, readonly: bool) -> MountedGuest | None:
    """The guest of a plain disk, mounted; None, and nothing mounted, where it is not plain.

    Args:
        appliance: has this one disk.
        disk: its device.
        readonly: mount without writing.
    """
    try:
        volumes = _look_at(appliance, disk)
    except (UnclearLayoutError, ApplianceCallError) as exc:
        log.info("%s is not plain: %s", disk, exc)
        return None
    try:
        return _mount(appliance, volumes, readonly=readonly)
    except (UnclearLayoutError, ApplianceCallError, InspectionError) as exc:
        log.info("%s is not plain: %s", disk, exc)
    appliance.call("umount_all")
    return None


def _look_at(appliance: Appliance, disk: str) -> dict[str, _Volume]:
    """What is on the disk, by device.

    Raises:
        UnclearLayoutError: it is not plain.
    """
    head: bytes = appliance.call("pread_device", disk, FIRST_READING, 0)
    partitions = parse_partitions(head)
    if len(partitions) > PARTITIONS:
        raise UnclearLayoutError(f"{len(partitions)} partitions")
    volumes = {}
    for partition in partitions:
        size = min(START_SIZE, partition.size or START_SIZE)
        start = head[partition.start : partition.start + size]
        if len(start) < size:
            start = appliance.call("pread_device", disk, size, partition.start)
        superblock = identify(start)
        if superblock is None and partition.kind not in BOOT_CODE_TYPES:
            raise UnclearLayoutError(f"partition {partition.number} holds nothing plain")
        device = f"{disk}{partition.number or ''}"
        volumes[device] = _Volume(device=device, partition=partition, superblock=superblock)
    return volumes


def _mount(appliance: Appliance, volumes: Mapping[str, _Volume], *, readonly: bool) -> MountedGuest:
    """The guest, mounted.

    Raises:
        UnclearLayoutError: no root, perhaps several, or more to mount than is plain.
        ApplianceCallError: something cannot be mounted or asked.
        InspectionError: likewise, or the files cannot be read.
    """
    candidates = [volume for volume in volumes.values() if volume.is_unix]
    if not candidates:
        raise UnclearLayoutError("no filesystem that may be Linux's root")
    likely = max(candidates, key=_likelihood)
    # what may turn out to be no root is not written to, not even by being mounted
    looking = readonly or len(candidates) > 1
    files = mount_root(appliance, likely.device, readonly=looking, driver=likely.driver)
    root = unix_root(files, likely.device)
    if root is None or root.system != "linux":
        raise UnclearLayoutError(f"{likely.device} holds no Linux")
    names = DeviceNames(list(volumes), lambda *asked: _tag(appliance, volumes, *asked))
    mounting = Mounting(
        appliance=appliance,
        files=files,
        root=root,
        names=names,
        readonly=readonly,
        driver_of=lambda device: volumes[device].driver,
    )
    wanted = wanted_mounts(files, root, names)
    if any(entry.device and entry.mount.place not in ON_DEMAND for entry in wanted):
        raise UnclearLayoutError("fstab mounts more than /boot")
    others = {volume.device for volume in candidates} - {root.device}
    if others - {entry.device for entry in wanted}:
        raise UnclearLayoutError("there is a filesystem that fstab does not mount")
    if looking and not readonly:
        appliance.call("remount", "/", rw=True)
    guest = mounting.mount_wanted()
    _check_boot(files, guest, wanted, others)
    return guest


def _check_boot(
    files: ApplianceFilesystem, guest: MountedGuest, wanted: list[WantedMount], others: set[str]
) -> None:
    """Raise where a filesystem for ``/boot`` was not mounted, or may be a root too."""
    for entry in wanted:
        place, device = entry.mount.place, entry.device
        if device is None:
            continue
        if guest.mountpoints.get(str(place)) != device:
            raise UnclearLayoutError(f"{device} cannot be mounted on {place}")
        if device in others and OF_A_ROOT & set(files.list_directory(place)):
            raise UnclearLayoutError(f"{device} may be a root too")


def _likelihood(volume: _Volume) -> tuple[bool, int]:
    """Of several filesystems, the root says so itself (ext), or is the largest."""
    block = volume.superblock
    return (block is not None and block.last_mounted in MOUNTED_AS_ROOT, volume.partition.size)


def _tag(appliance: Appliance, volumes: Mapping[str, _Volume], device: str, tag: str) -> str:
    """What fstab may call a volume by: its UUID or LABEL, or its partition's UUID or name."""
    volume, superblock = volumes[device], volumes[device].superblock
    if tag.startswith("PART_"):
        partition = volume.partition
        return partition.uuid if tag == "PART_ENTRY_UUID" else partition.name
    if superblock is None:
        return ""
    # FAT's label is in its root directory, and the others' tags were not read
    if superblock.kind in ("ntfs", "exfat") or (superblock.kind == "vfat" and tag == "LABEL"):
        return blkid_tag(appliance, device, tag)
    return superblock.uuid if tag == "UUID" else superblock.label
