"""Recognise the content of an image's disks by each volume's first bytes.

libguestfs's ``list_filesystems`` starts several processes for each partition, so a disk
with sixty partitions takes minutes. udev, LVM and a scan for btrfs take ten more
seconds. Reading a partition's first bytes once is usually enough. If it is not, the
appliance's blkid(8) is run for that partition.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vmprovision.appliance.devicenames import LVM_UUID
from vmprovision.appliance.groups import Mapped, Member, find_logical_volumes
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.partitions import (
    BOOT_CODE_TYPES,
    EndlessTableError,
    Partition,
    UnclearLayoutError,
    parse_partitions,
)
from vmprovision.disklayout.subvolumes import split_subvolume
from vmprovision.disklayout.superblocks import START_SIZE, identify, identify_kind
from vmprovision.errors import InspectionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmprovision.appliance.session import Appliance
    from vmprovision.disklayout.partitions import ReadAt
    from vmprovision.disklayout.superblocks import Superblock

log = logging.getLogger(__name__)

READING_LIMIT = 2 << 20  # a message of libguestfs has at most 4 MiB
KEPT_READINGS = 8  # the first partition is read for the size of its sectors, too
DISK_LIMIT = 1 << 62  # a place beyond is not a number for libguestfs
BLOCK = 4096  # unused bytes at a volume's end; a RAID's superblock needs twice as many
UNIX = ("ext", "xfs", "btrfs")
LVM, RAID = "LVM2_member", "linux_raid_member"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A partition, a whole disk or a logical volume, with its content.

    Attributes:
        device: its name in the appliance.
        superblock: the superblock of the only plain filesystem, or swap.
        kind: blkid(8)'s name of the content, or None if blkid must be run.
        lvm_uuid: for a logical volume, the group's and its own UUID, as device-mapper
            joins them.
    """

    device: str
    partition: Partition
    superblock: Superblock | None
    kind: str | None
    lvm_uuid: str = ""

    @property
    def is_unix(self) -> bool:
        """Whether a root of Linux may be on it."""
        return self.superblock is not None and self.superblock.kind in UNIX

    @property
    def is_nothing(self) -> bool:
        """Whether it has no filesystem: only boot code, or zeros."""
        boot_code = self.superblock is None and self.partition.kind in BOOT_CODE_TYPES
        return boot_code or self.kind == "unknown"

    @property
    def driver(self) -> str:
        """The kernel's filesystem, if the volume can hold nothing else.

        A filesystem that leaves room at the volume's end may be a member of an old
        RAID, whose superblock is there. mount(8) detects that and refuses.
        """
        block = self.superblock
        filled = block is not None and 0 <= self.partition.size - block.size < BLOCK
        return block.driver if block is not None and filled else ""

    @property
    def certain_kind(self) -> str:
        """The kind that the first bytes prove; empty if blkid(8) must be run."""
        if self.is_unix:
            return self.driver
        return "unknown" if self.is_nothing else self.kind or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The content of an image's disks."""

    volumes: Mapping[str, Volume]
    mapped: Sequence[Mapped]
    types: Sequence[str]

    def start_volumes(self, appliance: Appliance) -> None:
        """Create the logical volumes.

        Raises:
            ApplianceCallError: they cannot be created.
        """
        if self.mapped:
            table = ";".join(each.table for each in self.mapped)
            appliance.map_devices(table, [each.name for each in self.mapped])

    def driver(self, device: str) -> str:
        """Return the kernel's filesystem on a device or subvolume; empty if mount(8) must probe."""
        volume = self.volumes.get(split_subvolume(device)[0])
        return volume.driver if volume else ""

    def tag(self, appliance: Appliance, device: str, tag: str) -> str:
        """Return a tag by which fstab may name a volume; tags are named as in ``devicenames``."""
        volume = self.volumes[device]
        superblock = volume.superblock
        if tag == LVM_UUID:
            return volume.lvm_uuid
        if tag.startswith("PART_"):
            partition = volume.partition
            return partition.uuid if tag == "PART_ENTRY_UUID" else partition.name
        # FAT's label is in its root directory, and some tags are not parsed here
        is_read = superblock is not None and superblock.kind not in ("ntfs", "exfat")
        if superblock is None or not is_read or (superblock.kind == "vfat" and tag == "LABEL"):
            return "" if volume.is_nothing else blkid_tags(appliance, device).get(tag, "")
        return superblock.uuid if tag == "UUID" else superblock.label


def blkid_tags(appliance: Appliance, device: str) -> Mapping[str, str]:
    """Return blkid(8)'s tags of a device; this starts a process in the appliance."""
    try:
        return dict(appliance.call("blkid", device))
    except (ApplianceCallError, UnicodeDecodeError):  # nothing recognised, or not text
        return {}


def kind_of_device(appliance: Appliance, device: str) -> str:
    """Return blkid(8)'s name of a device's content; empty if blkid recognises none."""
    try:
        return str(appliance.call("vfs_type", device))
    except ApplianceCallError:
        return ""


def read_contents(appliance: Appliance, disks: Sequence[str]) -> Contents:
    """Return the content of these disks.

    Raises:
        UnclearLayoutError: the appliance's own tools must be used.
        InspectionError: a partition table is endless.
        ApplianceCallError: a disk cannot be read.
    """
    volumes: dict[str, Volume] = {}
    members: list[Member] = []
    for disk in disks:
        try:
            found = _read_disk(appliance, disk)
        except EndlessTableError as exc:
            raise InspectionError(
                f"the partition table of {disk} is damaged: {exc}",
                hint="repair it with sfdisk or gparted",
            ) from exc
        for volume, read in found:
            volumes[volume.device] = volume
            if volume.kind == LVM:
                members.append(Member(device=volume.device, size=volume.partition.size, read=read))
    types = [volume.partition.kind for volume in volumes.values()]
    mapped = find_logical_volumes(members)
    for member in members:
        del volumes[member.device]
    for each in mapped:
        volume = _logical_volume(each)
        if volume.kind == LVM:
            raise UnclearLayoutError(f"{volume.device} is itself a physical volume")
        volumes[volume.device] = volume
    _require_clear(volumes.values())
    return Contents(volumes=volumes, mapped=mapped, types=types)


def _require_clear(volumes: Iterable[Volume]) -> None:
    """Raise an error if a layer must be started before its content can be seen."""
    for volume in volumes:
        if volume.kind == RAID:
            raise UnclearLayoutError(f"{volume.device} is a member of an array")
        if volume.superblock is not None and volume.superblock.devices != 1:
            raise UnclearLayoutError(f"{volume.device} is one of several devices of a btrfs")


def _read_disk(appliance: Appliance, disk: str) -> list[tuple[Volume, ReadAt]]:
    """Return the volumes of a disk, each with a function that reads it."""
    head = appliance.read_device(disk, 0, START_SIZE)

    @functools.lru_cache(KEPT_READINGS)
    def read(place: int, size: int) -> bytes:
        if place + size <= len(head):
            return head[place : place + size]
        return _read_at(appliance, disk, place, size)

    found: list[tuple[Volume, ReadAt]] = []
    partitions = parse_partitions(head, read)
    if [partition.number for partition in partitions] == [0]:
        size = int(appliance.call("blockdev_getsize64", disk))
        partitions = (replace(partitions[0], size=size),)
    for partition in partitions:
        start = read(partition.start, min(START_SIZE, partition.size))
        volume = Volume(
            device=f"{disk}{partition.number or ''}",
            partition=partition,
            superblock=identify(start),
            kind=identify_kind(start),
        )
        found.append((volume, functools.partial(_read_part, read, partition, start)))
    return found


def _read_part(read: ReadAt, partition: Partition, start: bytes, place: int, size: int) -> bytes:
    """Return bytes of a partition, from its first bytes if these suffice."""
    if place + size <= len(start):
        return start[place : place + size]
    return read(partition.start + place, min(size, partition.size - place))


def _read_at(appliance: Appliance, disk: str, place: int, size: int) -> bytes:
    """Return bytes of a disk; fewer at its end."""
    if place + size > DISK_LIMIT:
        raise UnclearLayoutError("an offset is outside of any disk")
    parts = [
        appliance.read_device(disk, at, min(READING_LIMIT, place + size - at))
        for at in range(place, place + size, READING_LIMIT)
    ]
    return b"".join(parts)


def _logical_volume(mapped: Mapped) -> Volume:
    size = mapped.volume.size
    start = mapped.read(min(START_SIZE, size))
    return Volume(
        device=f"/dev/{mapped.name}",
        partition=Partition(number=0, start=0, size=size),
        superblock=identify(start),
        kind=identify_kind(start),
        lvm_uuid=mapped.volume.uuid,
    )
