"""Read the metadata of an LVM2 volume group: its devices and its logical volumes.

This module reads only groups whose logical volumes are all linear or striped.  Writes to
the origin of a snapshot, or to a cached volume, must pass through LVM's own targets.  For
any other group ``UnclearLayoutError`` says why, and the caller uses LVM itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from vmprovision.disklayout.lvmtext import parse_text
from vmprovision.disklayout.partitions import SECTOR, UnclearLayoutError

if TYPE_CHECKING:
    from vmprovision.disklayout.lvmtext import Section, Value
    from vmprovision.disklayout.partitions import ReadAt

_UUID = re.compile(r"[A-Za-z0-9]{6}(?:-[A-Za-z0-9]{4}){5}-[A-Za-z0-9]{6}")
_NAME = re.compile(r"(?!-|\.{1,2}$)[A-Za-z0-9_.+-]{1,127}")
_PLAIN_STATUS = frozenset(("READ", "WRITE", "VISIBLE"))
_GROUP_STATUS = frozenset(("READ", "WRITE", "RESIZEABLE"))
_SEGMENTS_LIMIT = 4000
_SECTORS_LIMIT = 1 << 54  # 8 EiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive sectors of a logical volume.

    Attributes:
        size: in sectors.
        stripe: the sectors of a stripe on one device; 0 if there is only one device.
        areas: for each device the physical volume's UUID and the first sector on it.
    """

    size: int
    stripe: int
    areas: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolume:
    """A logical volume that is linear or striped.

    Attributes:
        name: its own name, without the group's.
        uuid: the group's and its own UUID, as device-mapper joins them.
        segments: in order from its first sector, without gaps.
    """

    name: str
    uuid: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return sum(segment.size for segment in self.segments) * SECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGroup:
    """A volume group whose logical volumes are all linear or striped.

    Attributes:
        sequence: the number of the metadata's last change.
        sizes: the used sectors of each physical volume, by its UUID.
    """

    name: str
    sequence: int
    sizes: Mapping[str, int]
    volumes: tuple[LogicalVolume, ...]


def parse_group(text: str) -> VolumeGroup:
    """Return the volume group that a metadata text describes.

    Raises:
        UnclearLayoutError: the text is damaged, or the group needs LVM itself.
    """
    sections = {name: value for name, value in parse_text(text).items() if _is_section(value)}
    if len(sections) != 1:
        raise UnclearLayoutError("the LVM metadata describes no single volume group")
    ((name, value),) = sections.items()
    group = _section(value)
    _require_plain_group(_checked(_NAME, name), group)
    extent = _number(group, "extent_size", 1)
    places, sizes = _physical_volumes(_section(group.get("physical_volumes", {})), extent)
    volumes = [
        _logical_volume(_joined(group.get("id")), volume, _section(described), places, extent)
        for volume, described in _section(group.get("logical_volumes", {})).items()
    ]
    _require_apart(volumes, sizes)
    return VolumeGroup(
        name=name, sequence=_number(group, "seqno", 0), sizes=sizes, volumes=tuple(volumes)
    )


def _require_plain_group(name: str, group: Section) -> None:
    if not set(_strings(group, "status")) <= _GROUP_STATUS or _strings(group, "flags"):
        raise UnclearLayoutError(f"the volume group {name} is exported, shared or read-only")
    if group.get("system_id") or group.get("lock_type", "none") != "none":
        raise UnclearLayoutError(f"the volume group {name} belongs to a certain host")


def _physical_volumes(
    section: Section, extent: int
) -> tuple[dict[str, tuple[str, int, int]], dict[str, int]]:
    """Return UUID, first sector and extents by name, and used sectors by UUID."""
    places, sizes = {}, {}
    for name, value in section.items():
        described = _section(value)
        uuid = _checked(_UUID, described.get("id"))
        if _strings(described, "flags") or uuid in sizes:
            raise UnclearLayoutError(f"the physical volume {name} is missing or duplicated")
        start, count = _number(described, "pe_start", 0), _number(described, "pe_count", 0)
        places[name] = (uuid, start, count)
        sizes[uuid] = start + count * extent
        if sizes[uuid] > _SECTORS_LIMIT:
            raise UnclearLayoutError(f"the physical volume {name} is too large")
    return places, sizes


def _logical_volume(
    group: str,
    name: str,
    section: Section,
    places: Mapping[str, tuple[str, int, int]],
    extent: int,
) -> LogicalVolume:
    _checked(_NAME, name)
    if set(_strings(section, "status")) != _PLAIN_STATUS or _strings(section, "flags"):
        raise UnclearLayoutError(f"the logical volume {name} is hidden, read-only or not started")
    count = _number(section, "segment_count", 1)
    if count > _SEGMENTS_LIMIT:
        raise UnclearLayoutError(f"the logical volume {name} has too many segments")
    segments, done = [], 0
    for number in range(1, count + 1):
        described = _section(section.get(f"segment{number}"))
        kind = described.get("type")
        if kind != "striped":
            raise UnclearLayoutError(f"the logical volume {name} is of the type {kind!r:.40}")
        if _number(described, "start_extent", 0) != done:
            raise UnclearLayoutError(f"the logical volume {name} has a gap")
        done += _number(described, "extent_count", 1)
        segments.append(_segment(described, places, extent))
    return LogicalVolume(
        name=name, uuid=group + _joined(section.get("id")), segments=tuple(segments)
    )


def _segment(section: Section, places: Mapping[str, tuple[str, int, int]], extent: int) -> Segment:
    extents, stripes = _number(section, "extent_count", 1), section.get("stripes")
    if not isinstance(stripes, list) or not stripes or len(stripes) % 2:
        raise UnclearLayoutError("a logical volume's segment is damaged")
    names, starts = stripes[::2], stripes[1::2]
    if _number(section, "stripe_count", 1) != len(names) or extents % len(names):
        raise UnclearLayoutError("a logical volume's segment is damaged")
    areas = []
    for name, start in zip(names, starts, strict=True):
        place = places.get(name) if isinstance(name, str) else None
        if place is None or not isinstance(start, int):
            raise UnclearLayoutError("a logical volume is not on a device")
        uuid, first, count = place
        if not 0 <= start <= count - extents // len(names):
            raise UnclearLayoutError("a logical volume is outside its device")
        areas.append((uuid, first + start * extent))
    stripe = _number(section, "stripe_size", 1) if len(areas) > 1 else 0
    if stripe and extent % stripe:
        raise UnclearLayoutError("a logical volume's stripes are of an unusual size")
    return Segment(size=extents * extent, stripe=stripe, areas=tuple(areas))


def _require_apart(volumes: list[LogicalVolume], sizes: Mapping[str, int]) -> None:
    """Raise an error if two segments share sectors."""
    used: dict[str, list[tuple[int, int]]] = {uuid: [] for uuid in sizes}
    for volume in volumes:
        for segment in volume.segments:
            length = segment.size // len(segment.areas)
            for uuid, start in segment.areas:
                used[uuid].append((start, start + length))
    for pieces in used.values():
        for (_, end), (start, _) in pairwise(sorted(pieces)):
            if end > start:
                raise UnclearLayoutError("two logical volumes overlap")


def read_volume(volume: LogicalVolume, devices: Mapping[str, ReadAt], size: int) -> bytes:
    """Return the first ``size`` bytes of a logical volume, or all if it is smaller.

    Args:
        volume: the logical volume.
        devices: functions that read the physical volumes, by UUID.
        size: a multiple of the sector's size.
    """
    parts: list[bytes] = []
    wanted = size // SECTOR
    for segment in volume.segments:
        done = 0
        while wanted and done < segment.size:
            row, within = divmod(done, segment.stripe) if segment.stripe else (0, done)
            turn, number = divmod(row, len(segment.areas))
            uuid, start = segment.areas[number]
            left = (segment.stripe or segment.size) - within
            count = min(left, segment.size - done, wanted)
            place = start + turn * segment.stripe + within
            parts.append(devices[uuid](place * SECTOR, count * SECTOR))
            done, wanted = done + count, wanted - count
    return b"".join(parts)


def mapping_table(volume: LogicalVolume, devices: Mapping[str, str]) -> list[str]:
    """Return the lines of the device-mapper table for a logical volume.

    Args:
        volume: the logical volume.
        devices: the physical volumes' device nodes, by UUID.
    """
    lines, done = [], 0
    for segment in volume.segments:
        areas = " ".join(f"{devices[uuid]} {start}" for uuid, start in segment.areas)
        target = f"striped {len(segment.areas)} {segment.stripe}" if segment.stripe else "linear"
        lines.append(f"{done} {segment.size} {target} {areas}")
        done += segment.size
    return lines


def mapper_name(group: str, volume: str) -> str:
    """Return device-mapper's name of a logical volume; hyphens inside the names are doubled."""
    return "-".join(part.replace("-", "--") for part in (group, volume))


def _is_section(value: Value) -> bool:
    return isinstance(value, Mapping)


def _section(value: Value | None) -> Section:
    if not isinstance(value, Mapping):
        raise UnclearLayoutError("the LVM metadata is malformed")
    return value


def _number(section: Section, name: str, least: int) -> int:
    value = section.get(name)
    if not isinstance(value, int) or not least <= value <= _SECTORS_LIMIT:
        raise UnclearLayoutError(f"the LVM metadata has no valid {name}")
    return value


def _strings(section: Section, name: str) -> list[str]:
    value = section.get(name, [])
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UnclearLayoutError(f"the LVM metadata has no valid {name}")
    return [str(each) for each in value]


def _checked(pattern: re.Pattern[str], value: Value | None) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise UnclearLayoutError("a name or UUID in the LVM metadata is invalid")
    return value


def _joined(value: Value | None) -> str:
    return _checked(_UUID, value).replace("-", "")
