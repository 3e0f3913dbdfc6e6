"""Plain partition tables, read from a disk's first bytes: none, a GPT, an MBR of primaries.

UEFI specification, chapter 5 (GPT and the protective MBR).  The bytes are a
guest's and may be anything: what is not plainly one of the three is
``UnclearLayoutError``, and the caller asks the appliance's own tools.
"""

from __future__ import annotations

import itertools
import struct
import uuid
import zlib
from dataclasses import dataclass

SECTOR = 512
HEAD_SIZE = 34 * SECTOR  # the protective MBR, the GPT's header and its usual 128 entries
_SIGNATURE = b"\x55\xaa"
_GPT_MAGIC = b"EFI PART"
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_REVISION = 1 << 16
_ENTRIES_LIMIT = 128
_MBR_ENTRY = struct.Struct("<B3xB3xII")
_PROTECTIVE = 0xEE
# Filesystems and swap, nothing that holds partitions or volumes of its own.
_MBR_PLAIN = (0x01, 0x04, 0x06, 0x07, 0x0B, 0x0C, 0x0E, 0x82, 0x83, 0xEF)

# GPT types whose partitions hold a boot loader's code and no filesystem.
BOOT_CODE_TYPES = (
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b",  # PReP
)


class UnclearLayoutError(ValueError):
    """The disk lies otherwise than is told here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition; the whole disk, where there is no table, has the number 0.

    Attributes:
        start: in bytes.
        size: in bytes; 0 where it is not known.
        kind: its GPT type, or its MBR type in hexadecimal.
        uuid: its PARTUUID, as the kernel has it.
        name: its GPT name.
    """

    number: int
    start: int
    size: int
    kind: str = ""
    uuid: str = ""
    name: str = ""


def parse_partitions(head: bytes) -> tuple[Partition, ...]:
    """The partitions of a disk, by its first ``HEAD_SIZE`` bytes.

    Raises:
        UnclearLayoutError: its table is not plain, damaged, or partly beyond these bytes.
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
        return _apart(_parse_gpt(head))
    if head[SECTOR : SECTOR + 8] == _GPT_MAGIC:
        raise UnclearLayoutError("a GPT without a protective MBR")
    return _apart(_parse_mbr(head, entries))


def _without_table(head: bytes) -> tuple[Partition, ...]:
    """The whole disk; XFS begins there, and an ext filesystem leaves a kilobyte free."""
    if head[:4] != b"XFSB" and any(head[:1024]):
        raise UnclearLayoutError("something is in the first sectors that is no MBR")
    return (Partition(number=0, start=0, size=0),)


def _parse_gpt(head: bytes) -> list[Partition]:
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
    ) = _GPT_HEADER.unpack_from(head, SECTOR)
    if magic != _GPT_MAGIC or revision != _GPT_REVISION or not _GPT_HEADER.size <= size <= SECTOR:
        raise UnclearLayoutError("no GPT header where the protective MBR promises one")
    header = bytearray(head[SECTOR : SECTOR + size])
    header[16:20] = bytes(4)
    # the kernel reads no entries of another length
    if here != 1 or length != _GPT_ENTRY.size or not 0 < count <= _ENTRIES_LIMIT:
        raise UnclearLayoutError("an unusual GPT")
    if zlib.crc32(header) != checksum:
        raise UnclearLayoutError("the GPT header's checksum is wrong")
    entries = head[place * SECTOR : place * SECTOR + count * length]
    if place < 2 or len(entries) < count * length or zlib.crc32(entries) != entries_sum:  # noqa: PLR2004 -- after the header
        raise UnclearLayoutError("the GPT's entries are elsewhere, or their checksum is wrong")
    found = []
    for number in range(1, count + 1):
        kind, own, start, end, _, name = _GPT_ENTRY.unpack_from(entries, (number - 1) * length)
        if not any(kind):
            continue
        if not first <= start <= end <= last:
            raise UnclearLayoutError(f"partition {number} is outside of the disk")
        found.append(
            Partition(
                number=number,
                start=start * SECTOR,
                size=(end - start + 1) * SECTOR,
                kind=str(uuid.UUID(bytes_le=kind)),
                uuid=str(uuid.UUID(bytes_le=own)),
                name=name.decode("utf-16-le", errors="replace").partition("\0")[0],
            )
        )
    return found


def _parse_mbr(head: bytes, entries: list[tuple[int, int, int, int]]) -> list[Partition]:
    (signature,) = struct.unpack_from("<I", head, 440)
    found = []
    for number, (active, kind, start, size) in enumerate(entries, 1):
        if active not in (0, 0x80):
            raise UnclearLayoutError("no MBR but a boot sector")
        if not kind and not size:
            continue
        if kind not in _MBR_PLAIN or not size or not start:
            raise UnclearLayoutError(f"partition {number} has the type {kind:#04x}")
        found.append(
            Partition(
                number=number,
                start=start * SECTOR,
                size=size * SECTOR,
                kind=f"{kind:02x}",
                uuid=f"{signature:08x}-{number:02x}",
            )
        )
    return found


def _apart(found: list[Partition]) -> tuple[Partition, ...]:
    """The partitions, none of which lies in another."""
    if not found:
        raise UnclearLayoutError("a table without partitions")
    order = sorted(found, key=lambda partition: partition.start)
    for one, following in itertools.pairwise(order):
        if one.start + one.size > following.start:
            raise UnclearLayoutError(f"partitions {one.number} and {following.number} overlap")
    return tuple(found)
