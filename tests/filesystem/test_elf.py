"""What the header of an ELF file says."""

from __future__ import annotations

import struct

import pytest

from vmprovision.filesystem.elf import elf_abi, elf_architecture


def header(machine: int, bits: int, flags: int, order: str = "<") -> bytes:
    """Return the header of a program, as elf(5) has it."""
    start = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    addresses = "QQQ" if bits == 64 else "III"
    fields = struct.pack(f"{order}HHI{addresses}I", 2, machine, 1, 0, 0, 0, flags)
    return (start + fields).ljust(64, b"\0")


@pytest.mark.parametrize(
    ("found", "architecture", "abi"),
    [
        (header(40, 32, 0x5000400), "armv7l", "eabihf"),
        (header(40, 32, 0x5000200), "armv7l", "eabi"),
        (header(40, 32, 0x2000000), "arm-oabi", ""),
        (header(62, 64, 0), "x86_64", ""),
        (header(62, 32, 0), "x86_64", "x32"),
        (header(3, 32, 0), "i386", ""),
        (header(183, 64, 0), "aarch64", ""),
        (header(243, 64, 0x5), "riscv64", "lp64d"),
        (header(21, 64, 2), "ppc64le", "elfv2"),
        (header(21, 64, 1, ">"), "ppc64", "elfv1"),
        (header(22, 64, 0, ">"), "s390x", ""),
        (b"#!/bin/sh", None, ""),
        (b"", None, ""),
    ],
)
def test_an_elf_file_says_architecture_and_abi(
    found: bytes, architecture: str | None, abi: str
) -> None:
    """32-bit ARM alone has three ways to call; the flags tell them apart."""
    assert (elf_architecture(found), elf_abi(found)) == (architecture, abi)
