"""MD superblocks, those of version 1 by mdadm 4.2: whose member a device is, and who is missing."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from vmprovision.disklayout.mdraid import Member, missing_members, parse_member

MB = 1 << 20
# Version 1.2, the second of two halves, both at work.
WHOLE = bytes.fromhex(
    "fc4e2ba90100000000000000000000009c23bb3ada6cc708bdf04c25db3a6204"
    "67756573743a726f6f7400000000000000000000000000000000000000000000"
    "049e086b00000000010000000000000000f80000000000000000000002000000"
    "0000000000000000000000000000000000000000000000000000000000000000"
    "000800000000000000f800000000000008000000000000000000000000000000"
    "0100000000000000ea85d73d6669ce3f3095dae0d82fdb3a0000080010000000"
    "399e086b000000001200000000000000ffffffffffffffff9c18ad6880000000"
) + bytes.fromhex("00" * 32 + "00000100ffffffff")
# Version 1.0, made with the other half missing.
DEGRADED = bytes.fromhex(
    "fc4e2ba901000000000000000000000093eb288c3bac0135f13d3f49609408e0"
    "67756573743a726f6f7400000000000000000000000000000000000000000000"
    "5d9f086b00000000010000000000000080ff0000000000000000000002000000"
    "0000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000e0ff000000000000f0ff0000000000000000000000000000"
    "000000007f6f028178450d0bd0e2ec13f341b17a00000800f8ffffff8ba0086b"
)
DEGRADED = DEGRADED[:184].ljust(200, b"\0") + struct.pack("<Q", 25)
DEGRADED = DEGRADED.ljust(220, b"\0") + struct.pack("<I", 128) + bytes(32) + b"\0\0" + b"\xff" * 254


def device(place: int, superblock: bytes, size: int = 32 * MB) -> Member | None:
    """Return the member on a device with this superblock at this place."""
    content = bytearray(size)
    content[place : place + len(superblock)] = superblock
    return parse_member(lambda offset, length: bytes(content[offset : offset + length]), size)


def test_a_member_of_version_1_2() -> None:
    """Its array, its place in it and the places at work are read."""
    member = device(4096, WHOLE)
    assert member == Member(
        array="9c23bb3ada6cc708bdf04c25db3a6204",
        name="guest:root",
        slots=2,
        slot=1,
        events=18,
        active=frozenset({0, 1}),
    )


def test_a_member_of_version_1_0() -> None:
    """Its superblock is at the end; the half that was never there is not at work."""
    member = device(33546240, DEGRADED)
    assert member is not None
    assert (member.slot, member.active, member.events) == (0, frozenset({0}), 25)


def old_superblock(*states: int, number: int = 0) -> bytes:
    """A superblock of version 0.90 that knows members with these states."""
    words = [0] * 1024
    words[:4] = [0xA92B4EFC, 0, 90, 0]
    words[5], words[13:16] = 0x11111111, [0x22222222, 0x33333333, 0x44444444]
    words[10], words[11], words[39] = len(states), 3, 7
    for place, state in enumerate(states):
        words[128 + 32 * place : 128 + 32 * place + 5] = [place, 8, 0, place, state]
    words[992:997] = [number, 8, 0, number, states[number]]
    return struct.pack("<1024I", *words)


def test_a_member_of_version_0_90() -> None:
    """The places at work are those in step and not faulty; the array has a number for a name."""
    member = device(32 * MB - (64 << 10), old_superblock(6, 1, 6))
    assert member == Member(
        array="11111111222222223333333344444444",
        name="3",
        slots=3,
        slot=0,
        events=7,
        active=frozenset({0, 2}),
    )


@pytest.mark.parametrize("superblock", [b"", WHOLE[:64], b"\xfc\x4e\x2b\xa9" + b"\xff" * 4092])
def test_what_is_no_superblock(superblock: bytes) -> None:
    """No superblock, a truncated one and one with absurd numbers are not a member's."""
    assert device(4096, superblock) is None


def test_a_superblock_elsewhere_is_a_copy() -> None:
    """Version 1 says where it is: one that was copied with a disk's beginning does not count."""
    assert device(0, WHOLE) is None


def test_a_device_too_small_for_any() -> None:
    """Nothing is read past its end."""
    assert device(0, b"", size=512) is None


def test_who_is_missing() -> None:
    """Members that were active at the last change count as missing; outdated ones too."""
    member = device(4096, WHOLE)
    assert member is not None
    other = replace(member, slot=0)
    assert missing_members([member]) == 1
    assert missing_members([member, other]) == 0
    assert missing_members([member, replace(other, events=member.events - 1)]) == 0
    assert missing_members([member, replace(other, events=member.events - 9)]) == 1
    alone = replace(member, active=frozenset({1}), events=40)
    assert missing_members([alone, other]) == 0
