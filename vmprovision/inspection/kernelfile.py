"""Recognise a kernel's architecture by the first bytes of its file.

A guest's kernel may have another architecture than its programs, because a 64-bit
kernel also runs 32-bit programs. The formats are those of Linux's
Documentation/arch/*/boot and of ELF and PE.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from vmprovision.filesystem.elf import elf_architecture

if TYPE_CHECKING:
    from pathlib import Path

HEAD_SIZE = 128 << 10
# (offset, bytes) -> architecture
_MARKS = (
    (0x38, b"ARM\x64", "aarch64"),
    (0x38, b"RSC\x05", "riscv64"),
    (0x24, b"\x18\x28\x6f\x01", "armv7l"),
    (0x10008, b"S390EP", "s390x"),
)
_PE_MACHINES = {
    0x014C: "i386",
    0x01C2: "armv7l",
    0x5064: "riscv64",
    0x8664: "x86_64",
    0xAA64: "aarch64",
}
_LONG_MODE = 1  # XLF_KERNEL_64 in xloadflags


def kernel_architecture(path: Path) -> str | None:
    """Return the architecture of a kernel on this host, as uname(1) names it, or None."""
    if not path.is_file():
        return None  # the error appears when it is started
    with path.open("rb") as file:
        head = file.read(HEAD_SIZE)
    if head[:2] == b"\x1f\x8b":
        head = _unzipped(head)
    return architecture_by_head(head)


def architecture_by_head(head: bytes) -> str | None:
    """Return the architecture of a kernel that begins with these bytes; None if unknown."""
    if head[0x202:0x206] == b"HdrS":
        (flags,) = struct.unpack_from("<H", head.ljust(0x238, b"\0"), 0x236)
        return "x86_64" if flags & _LONG_MODE else "i386"
    for place, mark, architecture in _MARKS:
        if head[place : place + len(mark)] == mark:
            return architecture
    return elf_architecture(head) or _pe_architecture(head)


def _pe_architecture(head: bytes) -> str | None:
    """Return the architecture of a UEFI program, such as a self-extracting kernel (zboot)."""
    if head[:2] != b"MZ" or len(head) < 0x40:  # noqa: PLR2004 -- the header's size
        return None
    (place,) = struct.unpack_from("<I", head, 0x3C)
    if head[place : place + 4] != b"PE\0\0" or len(head) < place + 6:
        return None
    (machine,) = struct.unpack_from("<H", head, place + 4)
    return _PE_MACHINES.get(machine)


def _unzipped(head: bytes) -> bytes:
    """Return the beginning of the content of a gzip file, given the file's first bytes."""
    try:
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(head, HEAD_SIZE)
    except zlib.error:
        return b""
