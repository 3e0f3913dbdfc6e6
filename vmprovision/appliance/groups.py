"""Logical volumes of LVM2 without LVM: parsed from its metadata, created by device-mapper.

Starting LVM in the appliance takes udev and a scan of all devices, which is most of the
time of an injection. If all volume groups are complete and all their volumes are linear
or striped, the metadata alone gives the tables of device-mapper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.disklayout.lvm import (
    VolumeGroup,
    mapper_name,
    mapping_table,
    parse_group,
    read_volume,
)
from vmprovision.disklayout.lvmlabel import PhysicalVolume, parse_label
from vmprovision.disklayout.partitions import SECTOR, UnclearLayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vmprovision.disklayout.lvm import LogicalVolume
    from vmprovision.disklayout.partitions import ReadAt

VOLUMES_LIMIT = 256
SLACK = 4096  # unused bytes at a device's end; a RAID's superblock needs twice as many
TABLE_LIMIT = 100_000  # an argument of execve(2) has at most 128 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A device with an LVM label.

    Attributes:
        size: in bytes; 0 if unknown.
        read: reads its content.
    """

    device: str
    size: int
    read: ReadAt


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A logical volume that device-mapper is to create.

    Attributes:
        name: its name below ``/dev``: ``GROUP/VOLUME``.
        table: the device-mapper table, in the concise form of dmsetup(8).
        read: returns its first bytes, given their number.
    """

    name: str
    volume: LogicalVolume
    table: str
    read: Callable[[int], bytes]


def find_logical_volumes(members: Sequence[Member]) -> list[Mapped]:
    """Return the logical volumes of all groups whose members these devices are.

    Raises:
        UnclearLayoutError: LVM itself must be used.
        ApplianceCallError: a device cannot be read.
    """
    found: dict[str, tuple[Member, PhysicalVolume]] = {}
    for member in members:
        label = parse_label(member.read, member.size)
        if not 0 <= member.size - label.size < SLACK:
            # an old RAID's superblock would be at the end
            raise UnclearLayoutError(f"the physical volume on {member.device} does not fill it")
        if label.uuid in found:
            raise UnclearLayoutError("two devices are the same physical volume")
        found[label.uuid] = member, label
    groups = _newest_groups(label.text for _, label in found.values())
    owned = [uuid for group in groups for uuid in group.sizes]
    if sorted(owned) != sorted(found):
        raise UnclearLayoutError("a volume group is not complete")
    devices = {uuid: member for uuid, (member, _) in found.items()}
    volumes = [_mapped(group, volume, devices) for group in groups for volume in group.volumes]
    _require_small(volumes)
    for group in groups:
        for uuid, sectors in group.sizes.items():
            if sectors * SECTOR > devices[uuid].size:
                raise UnclearLayoutError(f"a device of the volume group {group.name} is too small")
    return volumes


def _newest_groups(texts: Iterable[str]) -> list[VolumeGroup]:
    """Return the groups in all metadata; raise an error if copies differ."""
    groups: dict[str, VolumeGroup] = {}
    for text in dict.fromkeys(filter(None, texts)):
        group = parse_group(text)
        if groups.setdefault(group.name, group) != group:
            raise UnclearLayoutError(f"the copies of the metadata of {group.name} differ")
    return list(groups.values())


def _mapped(group: VolumeGroup, volume: LogicalVolume, members: Mapping[str, Member]) -> Mapped:
    readers = {uuid: member.read for uuid, member in members.items()}
    lines = mapping_table(volume, {uuid: member.device for uuid, member in members.items()})
    name = mapper_name(group.name, volume.name)
    return Mapped(
        name=f"{group.name}/{volume.name}",
        volume=volume,
        table=",".join([name, f"LVM-{volume.uuid}", "", "rw", *lines]),
        read=lambda size: read_volume(volume, readers, size),
    )


def _require_small(volumes: Sequence[Mapped]) -> None:
    if len(volumes) > VOLUMES_LIMIT or sum(len(each.table) for each in volumes) > TABLE_LIMIT:
        raise UnclearLayoutError("there are too many logical volumes, or too many pieces of them")
