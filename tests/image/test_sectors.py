"""Disks whose sectors are large, and disks that do not end with a sector."""

from __future__ import annotations

import os
import struct
import subprocess
import uuid
import zlib
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.tiny import tiny_disk
from vmprovision.disklayout.partitions import (
    HEAD_SIZE,
    LARGE_SECTOR,
    SECTOR,
    parse_partitions,
    sector_size,
)

if TYPE_CHECKING:
    from pathlib import Path

MB = 1 << 20
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def gpt(sector: int, first: int, last: int, end: int) -> bytes:
    """Return the first sectors of a disk with one partition, counted in sectors of this size."""
    entry = struct.pack("<16s16sQQQ72s", LINUX.bytes_le, uuid.uuid4().bytes, first, last, 0, b"")
    entries = entry.ljust(128 * 128, b"\0")
    fields = [b"EFI PART", 1 << 16, 92, 0, 0, 1, end, 6, end - 6, uuid.uuid4().bytes]
    fields += [2, 128, 128, zlib.crc32(entries)]
    layout = struct.Struct("<8sIIIIQQQQ16sQIII")
    fields[3] = zlib.crc32(layout.pack(*fields))
    protective = mbr((0xEE, 1, 0xFFFFFFFF))
    return protective.ljust(sector, b"\0") + layout.pack(*fields).ljust(sector, b"\0") + entries


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """Return an MBR with these partitions: each a type, a start and a size in sectors."""
    table = bytearray(512)
    for number, entry in enumerate(entries):
        struct.pack_into("<4xB3xII", table, 446 + 16 * number, *entry)
    table[510:] = b"\x55\xaa"
    return bytes(table)


@pytest.mark.parametrize("sector", [SECTOR, LARGE_SECTOR])
def test_table_in_sectors(sector: int) -> None:
    """A GPT is read in the sectors that it is written in."""
    start = gpt(sector, MB // sector, 2 * MB // sector - 1, 4 * MB // sector - 1).ljust(MB, b"\0")
    assert sector_size(start) == sector
    (partition,) = parse_partitions(start)
    assert (partition.start, partition.size) == (MB, MB)


@pytest.mark.parametrize("sector", [SECTOR, LARGE_SECTOR])
def test_mbr_in_sectors(tmp_path: Path, sector: int) -> None:
    """An MBR is read in the sectors by which it leads to a filesystem, a logical one's too."""
    root = tiny_disk(tmp_path / "root", {}, block_size=LARGE_SECTOR).read_bytes()
    disk = bytearray(40 * MB)
    disk[:512] = mbr(
        (0x83, MB // sector, 16 * MB // sector), (5, 18 * MB // sector, 18 * MB // sector)
    )
    disk[18 * MB : 18 * MB + 512] = mbr((0x83, MB // sector, 16 * MB // sector))
    disk[MB : 17 * MB] = disk[19 * MB : 35 * MB] = root

    def read(place: int, size: int) -> bytes:
        return bytes(disk[place : place + size])

    assert sector_size(read(0, 2 * LARGE_SECTOR), read) == sector
    found = parse_partitions(read(0, HEAD_SIZE), read)
    assert [(each.number, each.start, each.size) for each in found] == [
        (1, MB, 16 * MB),
        (5, 19 * MB, 16 * MB),
    ]


@pytest.mark.parametrize("content", [b"\0", b"\xff"], ids=["empty", "filled"])
def test_an_mbr_that_leads_to_no_filesystem_counts_in_small_sectors(content: bytes) -> None:
    """Unknown content is not evidence for large sectors."""
    start = mbr((0x83, 2048, 8192)).ljust(2 * LARGE_SECTOR, b"\0")
    assert sector_size(start, lambda _, size: content * size) == SECTOR


@pytest.mark.appliance
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("table", ["gpt", "mbr"])
def test_guest_on_large_sectors(tmp_path: Path, table: str, kind: str) -> None:
    """The appliance's disk gets sectors of the size that its table counts in."""
    root = tiny_disk(tmp_path / "root", {}, size_mb=16, block_size=LARGE_SECTOR)
    size = 20 * MB
    first, count = MB // LARGE_SECTOR, 16 * MB // LARGE_SECTOR
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        if table == "gpt":
            file.write(gpt(LARGE_SECTOR, first, first + count - 1, size // LARGE_SECTOR - 1))
        else:
            file.write(mbr((0x83, first, count)))
        file.seek(MB)
        file.write(root.read_bytes())
        file.truncate(size)
    if kind == "qcow2":
        raw, image = image, tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    assert vmprovision.inject(image).changed
    assert vmprovision.verify(image).mismatches == ()


@pytest.mark.appliance
def test_disk_that_does_not_end_with_a_sector(tmp_path: Path) -> None:
    """It is worked on, and has its size afterwards."""
    image = tiny_disk(tmp_path / "disk.raw", {})
    os.truncate(image, image.stat().st_size + 300)
    size = image.stat().st_size
    assert vmprovision.inject(image).changed
    assert image.stat().st_size == size
    assert vmprovision.verify(image).mismatches == ()
