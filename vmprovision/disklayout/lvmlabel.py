"""Read the label of an LVM2 physical volume and the text of its group's metadata.

By LVM2's own ``lib/format_text/layout.h``: a label is in one of a device's first four
sectors and names the areas that hold metadata.  The header of such an area names a text,
with its checksum, that describes the volume group (``lvm``).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.disklayout.lvmtext import TEXT_LIMIT
from vmprovision.disklayout.partitions import SECTOR, UnclearLayoutError

if TYPE_CHECKING:
    from vmprovision.disklayout.partitions import ReadAt

LABEL_SECTORS = 4
_LABEL = struct.Struct("<8sQII8s")
_LABEL_ID, _LABEL_TYPE = b"LABELONE", b"LVM2 001"
_CHECKSUM_START = 20  # where the part of a label that its checksum covers begins
_CHECKSUM_SEED = 0xF597A6CF
_PV_HEADER = struct.Struct("<32sQ")
_LOCATION = struct.Struct("<QQ")
_AREA = struct.Struct("<I16sIQQ")
_AREA_ID = b" LVM2 x[5A%r0N*>"
_AREA_SIZE = 512
_TEXT_PLACE = struct.Struct("<QQII")
_IGNORED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalVolume:
    """A device that belongs to a volume group.

    Attributes:
        uuid: its UUID, with hyphens, not validated.
        size: the device's size when the label was written.
        text: the group's metadata; empty if this device keeps no copy.
    """

    uuid: str
    size: int
    text: str


def parse_label(read: ReadAt, size: int) -> PhysicalVolume:
    """Return the physical volume that a device's label describes.

    Raises:
        UnclearLayoutError: the label or the metadata is damaged.
    """
    head = read(0, LABEL_SECTORS * SECTOR)
    for start in range(0, len(head) - SECTOR + 1, SECTOR):
        sector = head[start : start + SECTOR]
        magic, number, checksum, offset, kind = _LABEL.unpack_from(sector)
        if magic == _LABEL_ID:
            break
    else:
        raise UnclearLayoutError("there is no LVM label")
    if kind != _LABEL_TYPE or number * SECTOR != start:
        raise UnclearLayoutError("the LVM label is damaged")
    if _checksum(sector[_CHECKSUM_START:]) != checksum:
        raise UnclearLayoutError("the checksum of the LVM label is wrong")
    if offset + _PV_HEADER.size > SECTOR:
        raise UnclearLayoutError("the LVM label is damaged")
    own, device_size = _PV_HEADER.unpack_from(sector, offset)
    uuid = _with_hyphens(own)
    areas = _metadata_areas(sector, offset + _PV_HEADER.size)
    texts = set(filter(None, (_read_text(read, *area, size) for area in areas)))
    if len(texts) > 1:
        raise UnclearLayoutError("the copies of the LVM metadata differ")
    return PhysicalVolume(uuid=uuid, size=device_size, text="".join(texts))


def _with_hyphens(raw: bytes) -> str:
    text = raw.decode("ascii", errors="replace")
    return "-".join([text[:6], *(text[at : at + 4] for at in range(6, 26, 4)), text[26:]])


def _metadata_areas(sector: bytes, offset: int) -> list[tuple[int, int]]:
    """Return offset and size of the metadata areas, which follow the list of data areas."""
    lists: list[list[tuple[int, int]]] = [[]]
    while len(lists) <= 2:  # noqa: PLR2004 -- the second list is complete
        if offset + _LOCATION.size > len(sector):
            raise UnclearLayoutError("the LVM label is damaged")
        place, size = _LOCATION.unpack_from(sector, offset)
        offset += _LOCATION.size
        if place:
            lists[-1].append((place, size))
        else:
            lists.append([])
    return lists[1]


def _read_text(read: ReadAt, place: int, size: int, device: int) -> str:
    """Return the metadata of an area; empty if it holds none."""
    if not _AREA_SIZE < size <= device - place:
        raise UnclearLayoutError("an LVM metadata area is outside its device")
    header = read(place, _AREA_SIZE)
    if len(header) < _AREA_SIZE:
        raise UnclearLayoutError("an LVM metadata area is outside its device")
    checksum, magic, version, here, length = _AREA.unpack_from(header)
    if (magic, version, here, length) != (_AREA_ID, 1, place, size):
        raise UnclearLayoutError("an LVM metadata area is damaged")
    if _checksum(header[4:]) != checksum:
        raise UnclearLayoutError("the checksum of an LVM metadata area is wrong")
    offset, count, text_sum, flags = _TEXT_PLACE.unpack_from(header, _AREA.size)
    if not offset or flags & _IGNORED:
        return ""
    if not _AREA_SIZE <= offset < size or not 0 < count <= min(size - _AREA_SIZE, TEXT_LIMIT):
        raise UnclearLayoutError("the LVM metadata is outside its area")
    # the area is a ring: text that passes its end continues after its header
    text = read(place + offset, min(count, size - offset))
    if len(text) < count:
        text += read(place + _AREA_SIZE, count - len(text))
    if _checksum(text) != text_sum:
        raise UnclearLayoutError("the checksum of the LVM metadata is wrong")
    return text.rstrip(b"\0").decode("utf-8", errors="replace")


def _checksum(content: bytes) -> int:
    """Return LVM's checksum: CRC-32 with its own start value and no inversion."""
    return zlib.crc32(content, _CHECKSUM_SEED ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
