"""Partition tables as sfdisk and sgdisk write them, and tables that are not plain."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.image.composed import MB, run_tool
from vmprovision.disklayout.partitions import (
    BOOT_CODE_TYPES,
    HEAD_SIZE,
    LOGICAL_LIMIT,
    WHOLE_DISK,
    EndlessTableError,
    Partition,
    UnclearLayoutError,
    parse_partitions,
)

if TYPE_CHECKING:
    from pathlib import Path

GPT = "label: gpt\n"
MBR = "label: dos\nlabel-id: 0x12ab34cd\n"


def disk(folder: Path, script: str) -> Path:
    """A disk of 64 MiB that sfdisk partitioned."""
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MB)
    if script:
        run_tool("sfdisk", "-q", str(image), stdin=script)
    return image


def head_of(image: Path) -> bytes:
    """The first bytes of a disk."""
    with image.open("rb") as file:
        return file.read(HEAD_SIZE)


@pytest.mark.parametrize(
    "script",
    [
        GPT + "size=1MiB, type=21686148-6449-6E6F-744E-656564454649\nsize=20MiB, name=root\n",
        GPT + '14: size=1MiB\n15: size=8MiB, type=U\n1: name="cloud root é"\n',
        GPT + "table-length: 16\nsize=4MiB\n",
        MBR + "size=8MiB, type=82\ntype=83, bootable\n",
        MBR + "3: size=8MiB, type=ef\n1: size=8MiB, type=c\n",
    ],
    ids=["gpt", "gpt-numbers", "gpt-short", "mbr", "mbr-numbers"],
)
def test_plain_tables_are_read_as_sfdisk_reads_them(script: str, tmp_path: Path) -> None:
    """Numbers, places, types, names and PARTUUIDs."""
    image = disk(tmp_path, script)
    table = json.loads(run_tool("sfdisk", "--json", str(image)))["partitiontable"]
    gpt = table["label"] == "gpt"
    expected = []
    for entry in table["partitions"]:
        number = int(entry["node"].removeprefix(str(image)))
        own = f"{int(table['id'], 16):08x}-{number:02x}" if not gpt else entry["uuid"].lower()
        expected.append(
            Partition(
                number=number,
                start=entry["start"] * 512,
                size=entry["size"] * 512,
                kind=entry["type"].lower() if gpt else f"{int(entry['type'], 16):02x}",
                uuid=own,
                name=entry.get("name", ""),
            )
        )
    found = parse_partitions(head_of(image))
    assert sorted(found, key=lambda p: p.number) == sorted(expected, key=lambda p: p.number)


def test_boot_code_is_known_by_its_type(tmp_path: Path) -> None:
    """GRUB's partition on a GPT, as sgdisk makes it."""
    image = disk(tmp_path, "")
    run_tool("sgdisk", "-n", "2:0:+1M", "-t", "2:ef02", "-n", "1:0:0", str(image))
    kinds = {partition.number: partition.kind for partition in parse_partitions(head_of(image))}
    assert kinds[2] in BOOT_CODE_TYPES
    assert kinds[1] not in BOOT_CODE_TYPES


def test_a_disk_without_a_table_is_one_volume(tmp_path: Path) -> None:
    """Its number is 0."""
    image = disk(tmp_path, "")
    run_tool("mke2fs", "-q", "-F", "-t", "ext4", str(image))
    assert parse_partitions(head_of(image)) == (Partition(number=0, start=0, size=0),)


def logical_disk(folder: Path, number: int) -> Path:
    """A disk whose extended partition has this many logical ones, and a primary before it."""
    lines = ["size=1MiB, type=83", "size=62MiB, type=5", *["size=512KiB"] * number]
    return disk(folder, MBR + "".join(f"{line}\n" for line in lines))


def all_of(image: Path) -> tuple[Partition, ...]:
    """The partitions of a disk, of which all may be read."""
    content = image.read_bytes()
    return parse_partitions(content[:HEAD_SIZE], lambda at, size: content[at : at + size])


@pytest.mark.parametrize("number", [0, 1, 25])
def test_logical_partitions_are_read_as_sfdisk_reads_them(number: int, tmp_path: Path) -> None:
    """The chain of tables is followed; numbers begin at five."""
    image = logical_disk(tmp_path, number)
    table = json.loads(run_tool("sfdisk", "--json", str(image)))["partitiontable"]
    expected = [
        (int(entry["node"].removeprefix(str(image))), entry["start"] * 512, entry["size"] * 512)
        for entry in table["partitions"]
        if entry["type"] != "5"
    ]
    found = all_of(image)
    assert [(each.number, each.start, each.size) for each in found] == expected
    assert len(found) == number + 1
    assert found[-1].uuid == f"12ab34cd-{found[-1].number:02x}"


@pytest.mark.parametrize("link", [0, 1])
def test_a_chain_that_leads_back_ends(link: int, tmp_path: Path) -> None:
    """The second table names itself, or the first one."""
    image = logical_disk(tmp_path, 3)
    content = bytearray(image.read_bytes())
    first = struct.unpack_from("<I", content, 446 + 16 + 8)[0]
    (offset,) = struct.unpack_from("<I", content, first * 512 + 446 + 16 + 8)
    place = (first + offset) * 512 + 446 + 16
    content[place + 4] = 5
    struct.pack_into("<I", content, place + 8, offset * link)
    image.write_bytes(content)
    with pytest.raises(EndlessTableError):
        all_of(image)


@pytest.mark.parametrize(
    "script",
    [
        MBR + "size=8MiB, type=5\n",
        MBR + "size=8MiB, type=a5\n",
        GPT + "table-length: 256\nsize=4MiB\n",
    ],
    ids=["extended", "bsd", "long-gpt"],
)
def test_other_tables_are_unclear(script: str, tmp_path: Path) -> None:
    """They are the appliance's own tools' affair."""
    with pytest.raises(UnclearLayoutError):
        parse_partitions(head_of(disk(tmp_path, script)))


@pytest.mark.parametrize("script", [MBR, GPT], ids=["mbr", "gpt"])
def test_a_disk_with_an_empty_table_is_one_volume(script: str, tmp_path: Path) -> None:
    """The kernel finds no partition, and the disk itself may hold a filesystem."""
    image = disk(tmp_path, script)
    assert parse_partitions(head_of(image)) == WHOLE_DISK
    with image.open("r+b") as file:  # a boot loader's code, or a FAT
        file.write(b"\xeb\x3c\x90")
    if script == MBR:
        with pytest.raises(UnclearLayoutError):
            parse_partitions(head_of(image))


WORD = st.integers(0, 0xFFFFFFFF) | st.integers(0, 40)
LINK = st.tuples(st.sampled_from([0, 5, 0x0F, 0x83, 0xA5]), WORD, WORD)


@settings(deadline=None)
@given(st.lists(st.tuples(LINK, LINK), min_size=1, max_size=9), st.integers(0, 8))
def test_any_chain_of_logical_partitions_ends(
    tables: list[tuple[tuple[int, int, int], ...]], back: int
) -> None:
    """With any tables, even one at every place, the parser ends."""
    head = bytearray(HEAD_SIZE)
    head[510:512] = b"\x55\xaa"
    head[446:462] = struct.pack("<B3xB3xII", 0, 5, 64, 0xFFFFFFFF)
    asked: list[int] = []

    def read(place: int, _size: int) -> bytes:
        asked.append(place)
        entries = tables[min(len(asked), back + len(tables)) % len(tables)]
        packed = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
        return (bytes(446) + packed).ljust(510, b"\0") + b"\x55\xaa"

    with contextlib.suppress(UnclearLayoutError):
        parse_partitions(bytes(head), read)
    assert len(asked) <= LOGICAL_LIMIT


@pytest.mark.parametrize("length", [128, 256, 1024])
def test_a_gpt_of_any_length(length: int, tmp_path: Path) -> None:
    """Entries behind the first bytes are read too, and count with the table's checksum."""
    lines = "size=1MiB\n" * 40
    image = disk(tmp_path, f"{GPT}first-lba: 2048\ntable-length: {length}\n{lines}")
    assert [each.number for each in all_of(image)] == list(range(1, 41))
    content = bytearray(image.read_bytes())
    content[1024 + 128 * (length - 1)] = 1
    image.write_bytes(content)
    with pytest.raises(UnclearLayoutError, match="checksum"):
        all_of(image)


@pytest.mark.parametrize("code", ["8e", "fd"])
def test_partitions_of_volumes_and_arrays(code: str, tmp_path: Path) -> None:
    """Those of LVM and RAID are partitions as others; what is on them says the rest."""
    (found,) = parse_partitions(head_of(disk(tmp_path, f"{MBR}size=8MiB, type={code}\n")))
    assert found.kind == code


def test_a_volume_group_on_the_whole_disk(tmp_path: Path) -> None:
    """LVM's label is in the second sector, and the first one is empty."""
    image = disk(tmp_path, "")
    content = bytearray(image.read_bytes())
    content[512:520] = b"LABELONE"
    image.write_bytes(content)
    assert parse_partitions(head_of(image)) == (Partition(number=0, start=0, size=0),)
    content[0] = 1
    image.write_bytes(content)
    with pytest.raises(UnclearLayoutError):
        parse_partitions(head_of(image))


def test_a_hybrid_mbr_is_unclear(tmp_path: Path) -> None:
    """A GPT whose MBR names partitions as well."""
    image = disk(tmp_path, GPT + "size=8MiB\nsize=8MiB\n")
    run_tool("sgdisk", "-h", "1", str(image))
    with pytest.raises(UnclearLayoutError, match="protective"):
        parse_partitions(head_of(image))


def test_a_fat_without_a_table_is_unclear(tmp_path: Path) -> None:
    """Its boot sector ends as an MBR does."""
    image = disk(tmp_path, "")
    run_tool("mkfs.vfat", str(image))
    with pytest.raises(UnclearLayoutError):
        parse_partitions(head_of(image))


@pytest.mark.parametrize("place", [450, 510, 512, 524, 536, 584, 592, 1024, 1064])
def test_a_damaged_gpt_is_unclear(place: int, tmp_path: Path) -> None:
    """One wrong byte, in the protective MBR, the header or the entries."""
    head = bytearray(head_of(disk(tmp_path, GPT + "size=8MiB\nsize=8MiB\n")))
    assert parse_partitions(bytes(head))
    head[place] ^= 0x41
    with pytest.raises(UnclearLayoutError):
        parse_partitions(bytes(head))


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(72, "<Q", 1), (72, "<Q", 1 << 63), (80, "<I", 0), (80, "<I", 0xFFFFFFFF), (84, "<I", 256)],
)
def test_a_hostile_gpt_with_right_checksums_is_unclear(
    offset: int, form: str, value: int, tmp_path: Path
) -> None:
    """Entries in the header, beyond the disk, none, too many, of another length."""
    head = bytearray(head_of(disk(tmp_path, GPT + "size=8MiB\n")))
    struct.pack_into(form, head, 512 + offset, value)
    head[512 + 16 : 512 + 20] = bytes(4)
    struct.pack_into("<I", head, 512 + 16, zlib.crc32(head[512 : 512 + 92]))
    with pytest.raises(UnclearLayoutError):
        parse_partitions(bytes(head))


def test_overlapping_partitions_are_unclear(tmp_path: Path) -> None:
    """One filesystem cannot be two."""
    head = bytearray(head_of(disk(tmp_path, MBR + "size=8MiB, type=83\nsize=8MiB, type=83\n")))
    struct.pack_into("<I", head, 446 + 12, 9 * MB // 512)
    with pytest.raises(UnclearLayoutError, match="overlap"):
        parse_partitions(bytes(head))


# how long it takes says more of the host than of the code
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=2048), st.sampled_from([0, 440, 510, 512, 1024]))
def test_any_bytes_give_an_answer_or_are_unclear(noise: bytes, place: int) -> None:
    """Nothing else is raised."""
    head = bytearray(HEAD_SIZE)
    head[510:512] = b"\x55\xaa"
    head[512:520] = b"EFI PART"
    head[place : place + len(noise)] = noise
    for size in (HEAD_SIZE, 100):
        with contextlib.suppress(UnclearLayoutError):
            parse_partitions(bytes(head[:size]))
    with contextlib.suppress(UnclearLayoutError):
        parse_partitions(bytes(head), lambda at, size: bytes(head[at % 512 : at % 512 + size]))
