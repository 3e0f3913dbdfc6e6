"""What an ELF file says of itself: its machine, and whether it runs alone (elf(5))."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmprovision.filesystem import resolved_file

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.filesystem import GuestReader

HEADER_SIZE = 64

# e_machine, bits, little-endian -> the architecture as `uname -m` has it
_MACHINES = {
    (3, 32, True): "i386",
    (62, 64, True): "x86_64",
    (62, 32, True): "x86_64",  # x32: a 64-bit kernel
    (40, 32, True): "armv7l",
    (183, 64, True): "aarch64",
    (243, 64, True): "riscv64",
    (243, 32, True): "riscv32",
    (21, 64, True): "ppc64le",
    (21, 64, False): "ppc64",
    (20, 32, False): "ppc",
    (22, 64, False): "s390x",
    (258, 64, True): "loongarch64",
    (8, 64, True): "mips64el",
    (8, 32, True): "mipsel",
    (8, 32, False): "mips",
    (2, 32, False): "sparc",
    (43, 64, False): "sparc64",
}
_ARM = (40, 32, True)
_EABI_4 = 4 << 24  # earlier ones are of another, older way to call the kernel
_INTERPRETER_SEGMENT = 3
_EXECUTABLE = (2, 3)  # at a fixed address, or at any


def elf_architecture(header: bytes) -> str | None:
    """The architecture that a file's first bytes name; None where it is no ELF file."""
    if len(header) < HEADER_SIZE or header[:4] != b"\x7fELF":
        return None
    bits = 64 if header[4] == 2 else 32  # noqa: PLR2004 -- ELFCLASS64
    little = header[5] == 1
    (machine,) = struct.unpack_from("<H" if little else ">H", header, 18)
    if (machine, bits, little) == _ARM and struct.unpack_from("<I", header, 36)[0] < _EABI_4:
        return "arm-oabi"
    return _MACHINES.get((machine, bits, little), f"elf-{machine}")


def runs_alone(content: bytes) -> bool:
    """Whether a whole ELF file is a program that needs no loader and so no library."""
    order = "<" if content[5] == 1 else ">"
    (kind,) = struct.unpack_from(f"{order}H", content, 16)
    if content[4] == 2:  # noqa: PLR2004 -- ELFCLASS64
        (start,) = struct.unpack_from(f"{order}Q", content, 32)
        size, count = struct.unpack_from(f"{order}HH", content, 54)
    else:
        (start,) = struct.unpack_from(f"{order}I", content, 28)
        size, count = struct.unpack_from(f"{order}HH", content, 42)
    places = range(start, start + size * count, size) if size else range(0)
    if kind not in _EXECUTABLE or not places or len(content) < places[-1] + size:
        return False
    segments = {struct.unpack_from(f"{order}I", content, place)[0] for place in places}
    return _INTERPRETER_SEGMENT not in segments


def architecture_of(reader: GuestReader, path: PurePosixPath) -> str | None:
    """The architecture of the program at a guest path, links followed; None where it is no ELF."""
    real = resolved_file(reader, path)
    if real is None:
        return None
    return elf_architecture(reader.read(real, limit=HEADER_SIZE))
