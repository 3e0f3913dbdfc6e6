"""What an image's disks hold, by the first bytes of each partition.

libguestfs's ``list_filesystems`` starts several processes for each partition, and a
disk of sixty takes it minutes.  One reading of a partition's first bytes mostly says
all of it; where it does not, the appliance's blkid(8) is asked for that one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.partitions import (
    BOOT_CODE_TYPES,
    EndlessTableError,
    UnclearLayoutError,
    parse_partitions,
)
from vmprovision.disklayout.superblocks import START_SIZE, identify, identify_kind
from vmprovision.errors import InspectionError

if TYPE_CHECKING:
    from vmprovision.appliance.session import Appliance
    from vmprovision.disklayout.partitions import Partition
    from vmprovision.disklayout.superblocks import Superblock

log = logging.getLogger(__name__)

# Partitioning tools begin the first partition at one MiB: one reading serves it too.
FIRST_READING = (1 << 20) + START_SIZE
BLOCK = 4096  # the least that a filesystem may leave over; a RAID takes twice as much
UNIX = ("ext", "xfs")
# What udev, LVM and mdadm make other devices of.
LAYERED = ("LVM2_member", "linux_raid_member", "btrfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A partition, or the whole disk, and what is on it.

    Attributes:
        superblock: of the one plain filesystem, or swap, that is there.
        kind: what is there as blkid(8) would say; None where that is to be asked.
    """

    device: str
    partition: Partition
    superblock: Superblock | None
    kind: str | None

    @property
    def is_unix(self) -> bool:
        """Whether a root of Linux may be on it."""
        return self.superblock is not None and self.superblock.kind in UNIX

    @property
    def is_nothing(self) -> bool:
        """Whether it holds no filesystem at all: boot code, or zeros."""
        boot_code = self.superblock is None and self.partition.kind in BOOT_CODE_TYPES
        return boot_code or self.kind == "unknown"

    @property
    def driver(self) -> str:
        """The kernel's filesystem, where nothing else can be on it.

        One that leaves room at its partition's end may be a member of an old RAID,
        whose own superblock is there: mount(8) looks, and does not mount it.
        """
        block = self.superblock
        filled = block is not None and 0 <= self.partition.size - block.size < BLOCK
        return block.driver if block is not None and filled else ""

    @property
    def certain_kind(self) -> str:
        """What the first bytes alone say for certain; empty where blkid(8) is to be asked."""
        if self.is_unix:
            return self.driver
        return "unknown" if self.is_nothing else self.kind or ""


def read_volumes(appliance: Appliance, disk: str) -> dict[str, Volume]:
    """Return what is on a disk, by device.

    Raises:
        UnclearLayoutError: its table is not plain.
        EndlessTableError: nor has it an end.
        ApplianceCallError: it cannot be read.
    """
    head: bytes = appliance.call("pread_device", disk, FIRST_READING, 0)

    def read(place: int, size: int) -> bytes:
        if place + size <= len(head):
            return head[place : place + size]
        return bytes(appliance.call("pread_device", disk, size, place))

    volumes = {}
    for partition in parse_partitions(head, read):
        start = read(partition.start, min(START_SIZE, partition.size or START_SIZE))
        device = f"{disk}{partition.number or ''}"
        volumes[device] = Volume(
            device=device,
            partition=partition,
            superblock=identify(start),
            kind=identify_kind(start),
        )
    return volumes


def find_kinds(appliance: Appliance) -> dict[str, str] | None:
    """Return what is on each disk or partition, as blkid(8) names it; ``unknown``: nothing.

    None where a table is not plain, or something would have to be started to see what
    is inside: an array, a volume group, a btrfs with its subvolumes.

    Raises:
        InspectionError: a partition table has no end.
        ApplianceError: the disks cannot be read.
    """
    volumes: dict[str, Volume] = {}
    try:
        for disk in appliance.call("list_devices"):
            volumes |= read_volumes(appliance, disk)
    except EndlessTableError as exc:
        raise InspectionError(
            f"the partition table of {disk} is damaged: {exc}",
            hint="repair it with sfdisk or gparted",
        ) from exc
    except (UnclearLayoutError, ApplianceCallError) as exc:
        log.info("libguestfs is asked for the filesystems: %s", exc)
        return None
    kinds = {
        device: volume.certain_kind or _asked_kind(appliance, device)
        for device, volume in volumes.items()
    }
    return kinds if set(LAYERED).isdisjoint(kinds.values()) else None


def _asked_kind(appliance: Appliance, device: str) -> str:
    try:
        return str(appliance.call("vfs_type", device)) or "unknown"
    except ApplianceCallError:  # nothing that blkid(8) knows
        return "unknown"
