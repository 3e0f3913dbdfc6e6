"""Parse partition tables from a disk's first bytes: none, a GPT or an MBR.

UEFI specification, chapter 5 (GPT and the protective MBR). An extended partition of an
MBR is a chain of tables elsewhere on the disk; each has one logical partition and the
place of the next table. The bytes are hostile input. For a layout that is not plainly
one of the three the parser raises ``UnclearLayoutError``, and the caller uses the
appliance's own tools. For an endless chain those tools would not end either, so it has
its own error.
"""

from __future__ import annotations

import itertools
import struct
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from vmprovision.disklayout.superblocks import START_SIZE, identify_kind

SECTOR = 512
LARGE_SECTOR = 4096
# The protective MBR, the GPT header and its usual 128 entries, in large sectors.
HEAD_SIZE = 6 * LARGE_SECTOR
_SIGNATURE = b"\x55\xaa"
_GPT_MAGIC = b"EFI PART"
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_REVISION = 1 << 16
_ENTRIES_LIMIT = 4096
_PARTITIONS_LIMIT = 255  # of the kernel
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_MBR_CODE_SIZE = 440  # then the disk's signature
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
FIRST_LOGICAL = 5
LOGICAL_LIMIT = 124  # sfdisk(8) makes at most 60, the kernel reads 251
# Filesystems, swap, LVM and RAID, but no type that contains partitions.
_MBR_PLAIN = (0x01, 0x04, 0x06, 0x07, 0x0B, 0x0C, 0x0E, 0x82, 0x83, 0x8E, 0xEF, 0xFD)
_LVM_LABEL = b"LABELONE"
_UNCLEAR = (None, "unknown")  # kinds of content at a partition's start

# GPT types of partitions with boot loader code and no filesystem.
BOOT_CODE_TYPES = (
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b",  # PReP
)
# EFI system partitions, which UEFI finds without an fstab: the types of a GPT and of an MBR.
EFI_SYSTEM_TYPES = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "ef")


class UnclearLayoutError(ValueError):
    """This module does not support the partition layout."""


class EndlessTableError(UnclearLayoutError):
    """The chain of logical partitions leads back to itself, or is longer than any real one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition; number 0 is the whole disk, if there is no table.

    Attributes:
        number: the partition's number.
        start: in bytes.
        size: in bytes; 0 if unknown.
        kind: the GPT type, or the MBR type in hexadecimal.
        uuid: the PARTUUID, as the kernel writes it.
        name: the GPT name.
    """

    number: int
    start: int
    size: int
    kind: str = ""
    uuid: str = ""
    name: str = ""


# What the kernel makes of a disk without a table, or with an empty one.
WHOLE_DISK = (Partition(number=0, start=0, size=0),)


ReadAt = Callable[[int, int], bytes]  # offset and size in bytes


def sector_size(start: bytes, read: ReadAt | None = None) -> int:
    """Return the sector size, in bytes, of a disk's partition table.

    A GPT is in the second sector, which shows the size. An MBR does not show it. Its
    sectors are large if the table leads to a filesystem only when counted in large
    sectors.

    Args:
        start: the disk's first ``2 * LARGE_SECTOR`` bytes, or more.
        read: reads other bytes. Without it an MBR counts in sectors of 512 bytes.
    """
    if start[SECTOR : SECTOR + 8] == _GPT_MAGIC:
        return SECTOR
    if start[LARGE_SECTOR : LARGE_SECTOR + 8] == _GPT_MAGIC:
        return LARGE_SECTOR
    if read is None or start[510:512] != _SIGNATURE:
        return SECTOR
    entries = [_MBR_ENTRY.unpack_from(start, 446 + 16 * number) for number in range(4)]
    firsts = [first for _, kind, first, size in entries if kind in _MBR_PLAIN and first and size]
    for sector in (SECTOR, LARGE_SECTOR):
        starts = (identify_kind(read(first * sector, START_SIZE)) for first in firsts)
        if any(kind not in _UNCLEAR for kind in starts):
            return sector
    return SECTOR


def parse_partitions(head: bytes, read: ReadAt | None = None) -> tuple[Partition, ...]:
    """Return the partitions of a disk, by its first ``HEAD_SIZE`` bytes.

    A disk without a table, or with an empty one, is one volume.

    Args:
        head: the first bytes.
        read: reads other bytes: the tables of an extended partition, and the
            filesystems that show an MBR's sector size.

    Raises:
        UnclearLayoutError: the table is unusual, damaged, or partly beyond these bytes.
        EndlessTableError: the chain of logical partitions has no end.
    """
    if len(head) < HEAD_SIZE:
        raise UnclearLayoutError("too small a disk")
    if head[510:512] != _SIGNATURE:
        return _without_table(head)
    entries = [_MBR_ENTRY.unpack_from(head, 446 + 16 * number) for number in range(4)]
    if _PROTECTIVE in [kind for _, kind, _, _ in entries]:
        used = [(kind, start) for _, kind, start, size in entries if kind or size]
        if used != [(_PROTECTIVE, 1)]:
            raise UnclearLayoutError("the protective MBR has other partitions too")
        return _apart(_parse_gpt(head, read)) or WHOLE_DISK
    if head[SECTOR : SECTOR + 8] == _GPT_MAGIC:
        raise UnclearLayoutError("a GPT without a protective MBR")
    found = _apart(_parse_mbr(head, entries, read))
    # FAT's boot sector has the same signature, with code or its own fields before it
    if not found and any(head[:_MBR_CODE_SIZE] + head[446:510]):
        raise UnclearLayoutError("a table without partitions")
    return found or WHOLE_DISK


def _without_table(head: bytes) -> tuple[Partition, ...]:
    """Return the whole disk as partition 0; most formats leave its first kilobyte free."""
    is_volume = head[SECTOR : SECTOR + 8] == _LVM_LABEL and not any(head[:SECTOR])
    if head[:4] != b"XFSB" and not is_volume and any(head[:1024]):
        raise UnclearLayoutError("the first sectors hold data that is not an MBR")
    return WHOLE_DISK


def _parse_gpt(head: bytes, read: ReadAt | None) -> list[Partition]:
    sector = sector_size(head)
    (
        magic,
        revision,
        size,
        checksum,
        _,
        here,
        _,
        first,
        last,
        _,
        place,
        count,
        length,
        entries_sum,
    ) = _GPT_HEADER.unpack_from(head, sector)
    if magic != _GPT_MAGIC or revision != _GPT_REVISION or not _GPT_HEADER.size <= size <= sector:
        raise UnclearLayoutError("a protective MBR without a GPT header")
    header = bytearray(head[sector : sector + size])
    header[16:20] = bytes(4)
    # the kernel ignores tables with entries of another length
    if here != 1 or length != _GPT_ENTRY.size or not 0 < count <= _ENTRIES_LIMIT:
        raise UnclearLayoutError("an unusual GPT")
    if zlib.crc32(header) != checksum:
        raise UnclearLayoutError("the GPT header's checksum is wrong")
    start, end = place * sector, place * sector + count * length
    entries = read(start, end - start) if end > len(head) and read else head[start:end]
    if place < 2 or len(entries) < count * length or zlib.crc32(entries) != entries_sum:  # noqa: PLR2004 -- after the header
        raise UnclearLayoutError("the GPT's entries are missing, or their checksum is wrong")
    found = []
    for number in range(1, count + 1):
        kind, own, start, end, _, name = _GPT_ENTRY.unpack_from(entries, (number - 1) * length)
        if not any(kind):
            continue
        if not first <= start <= end <= last or number > _PARTITIONS_LIMIT:
            raise UnclearLayoutError(f"partition {number} is outside the disk")
        found.append(
            Partition(
                number=number,
                start=start * sector,
                size=(end - start + 1) * sector,
                kind=str(uuid.UUID(bytes_le=kind)),
                uuid=str(uuid.UUID(bytes_le=own)),
                name=name.decode("utf-16-le", errors="replace").partition("\0")[0],
            )
        )
    return found


def _parse_mbr(
    head: bytes, entries: list[tuple[int, int, int, int]], read: ReadAt | None
) -> list[Partition]:
    sector = sector_size(head, read)
    (signature,) = struct.unpack_from("<I", head, 440)
    found: list[Partition] = []
    extended = []
    for number, (active, kind, start, size) in enumerate(entries, 1):
        if active not in (0, 0x80):
            raise UnclearLayoutError("a boot sector, not an MBR")
        if kind in _EXTENDED and read is not None:
            extended.append((start, size))
        elif kind or size:
            found.append(_of_mbr(signature, number, kind, start * sector, size * sector))
    if len(extended) > 1:
        raise UnclearLayoutError("more than one extended partition")
    if extended and read is not None:
        found += _parse_logical(signature, *extended[0], read, sector)
    return found


def _of_mbr(signature: int, number: int, kind: int, start: int, size: int) -> Partition:
    """Return a primary or logical partition of an MBR; its start and size in bytes."""
    if kind not in _MBR_PLAIN or not size or not start:
        raise UnclearLayoutError(f"partition {number} has the type {kind:#04x}")
    return Partition(
        number=number,
        start=start,
        size=size,
        kind=f"{kind:02x}",
        uuid=f"{signature:08x}-{number:02x}",
    )


def _parse_logical(
    signature: int, first: int, size: int, read: ReadAt, sector: int
) -> list[Partition]:
    """Return the logical partitions; arguments in sectors, offsets in the chain from its start."""
    found: list[Partition] = []
    here, seen = first, set[int]()
    while here not in seen and len(found) < LOGICAL_LIMIT:
        seen.add(here)
        table = read(here * sector, SECTOR)
        if len(table) < SECTOR or table[510:] != _SIGNATURE:
            raise UnclearLayoutError("a logical partition's table is damaged")
        entries = [_MBR_ENTRY.unpack_from(table, 446 + 16 * number) for number in range(4)]
        (_, kind, start, length), (_, linked, offset, _), *rest = entries
        if any(kind or length for _, kind, _, length in rest):
            raise UnclearLayoutError("a logical partition's table is unusual")
        if not (kind or length or linked or found):
            return []
        if not 0 < start <= start + length <= size - (here - first):
            raise UnclearLayoutError("a logical partition is outside the extended one")
        place = (here + start) * sector
        number = FIRST_LOGICAL + len(found)
        found.append(_of_mbr(signature, number, kind, place, length * sector))
        if not linked and not offset:
            return found
        if linked not in _EXTENDED or not 0 <= offset < size:
            raise UnclearLayoutError("a logical partition's table is unusual")
        here = first + offset
    raise EndlessTableError("the chain of its logical partitions has no end")


def _apart(found: list[Partition]) -> tuple[Partition, ...]:
    """Return the partitions after checking that none overlap."""
    order = sorted(found, key=lambda partition: partition.start)
    for one, following in itertools.pairwise(order):
        if one.start + one.size > following.start:
            raise UnclearLayoutError(f"partitions {one.number} and {following.number} overlap")
    return tuple(found)
