"""Read the facts in an ELF file: its architecture, its libraries, its symbols (elf(5)).

A guest's files are hostile, so every size in one is limited before it is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vmprovision.filesystem.protocol import resolved_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import GuestReader

HEADER_SIZE = 64
HEAD_SIZE = 4096  # holds the header, the segment table and the loader's name
SEGMENTS_LIMIT = 60
DYNAMIC_LIMIT = 64 << 10
NAMES_LIMIT = 4 << 20
PATH_LIMIT = 4096
FILE_LIMIT = 1 << 40

# (e_machine, bits, little-endian) -> the architecture, named as by `uname -m`
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
_EABI_4 = 4 << 24  # earlier versions use the old system call interface
_ARM_HARD_FLOAT = 0x400
_RISCV_FLOATS = ("lp64", "lp64f", "lp64d", "lp64q")
_LOADED_SEGMENT, _DYNAMIC_SEGMENT, _INTERPRETER_SEGMENT = 1, 2, 3
_NEEDED, _NAMES, _NAMES_SIZE, _RPATH, _RUNPATH = 1, 5, 10, 15, 29
_EXECUTABLE = (2, 3)  # at a fixed address, or at any


def elf_architecture(header: bytes) -> str | None:
    """Return the architecture in an ELF file's first bytes, or None for another file."""
    if len(header) < HEADER_SIZE or header[:4] != b"\x7fELF":
        return None
    bits = 64 if header[4] == 2 else 32  # noqa: PLR2004 -- ELFCLASS64
    little = header[5] == 1
    (machine,) = struct.unpack_from("<H" if little else ">H", header, 18)
    if (machine, bits, little) == _ARM and struct.unpack_from("<I", header, 36)[0] < _EABI_4:
        return "arm-oabi"
    return _MACHINES.get((machine, bits, little), f"elf-{machine}")


def elf_abi(header: bytes) -> str:
    """Return the calling convention in an ELF header; empty if the architecture has only one.

    Programs and libraries with different conventions do not run together: ``eabihf``
    and ``eabi`` are Debian's armhf and armel.
    """
    architecture = elf_architecture(header)
    order = "<" if header[5:6] == b"\1" else ">"
    if architecture == "x86_64":
        return "x32" if header[4] == 1 else ""
    if architecture == "armv7l":
        (flags,) = struct.unpack_from(f"{order}I", header, 36)
        return "eabihf" if flags & _ARM_HARD_FLOAT else "eabi"
    if architecture in {"ppc64le", "ppc64", "riscv64"}:
        (flags,) = struct.unpack_from(f"{order}I", header, 48)
        if architecture == "riscv64":
            return _RISCV_FLOATS[flags >> 1 & 3]
        return f"elfv{flags & 3}" if flags & 3 else ""
    return ""


def runs_alone(content: bytes) -> bool:
    """Return whether a complete ELF file is a program that needs no loader and no library."""
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


def read_elf_header(reader: GuestReader, path: PurePosixPath) -> bytes:
    """Return the first bytes of the program at a guest path, links followed; empty if not ELF."""
    real = resolved_file(reader, path)
    header = reader.read(real, limit=HEADER_SIZE) if real else b""
    return header if elf_architecture(header) else b""


def architecture_of(reader: GuestReader, path: PurePosixPath) -> str | None:
    """Return the architecture of the program at a guest path, links followed; None if not ELF."""
    return elf_architecture(read_elf_header(reader, path))


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfFile:
    """A program or library.

    Attributes:
        architecture: named as by ``uname -m``.
        loader: the path of its dynamic loader, or None if it needs none.
        libraries: the names of the libraries that it is linked with.
        library_paths: where its libraries are looked for first; ``$ORIGIN`` is its own
            directory.
        names: every symbol that it imports or exports, each followed by a zero byte.
    """

    architecture: str
    loader: str | None
    libraries: tuple[str, ...]
    library_paths: tuple[str, ...]
    names: bytes


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


def read_elf(reader: GuestReader, path: PurePosixPath) -> ElfFile | None:
    """Parse the file at a path without links; return None if it is not ELF."""
    head = reader.read(path, limit=HEAD_SIZE)
    architecture = elf_architecture(head)
    if architecture is None:
        return None
    segments = list(_segments(head))
    interpreter = next((each for each in segments if each.kind == _INTERPRETER_SEGMENT), None)
    loader = None
    if interpreter:
        raw = _read(reader, path, interpreter.offset, min(interpreter.size, PATH_LIMIT))
        loader = raw.rstrip(b"\0").decode("utf-8", "replace")
    entries = _dynamic_entries(reader, path, head, segments)
    values = dict(entries)
    names = _dynamic_names(reader, path, segments, values)
    return ElfFile(
        architecture=architecture,
        loader=loader,
        libraries=tuple(_name_at(names, value) for tag, value in entries if tag == _NEEDED),
        library_paths=tuple(
            folder
            for tag in (_RPATH, _RUNPATH)
            if tag in values
            for folder in _name_at(names, values[tag]).split(":")
        ),
        names=names,
    )


def _segments(head: bytes) -> Iterator[_Segment]:
    """Yield the entries of the program header table in a file's first bytes."""
    is_64, order = head[4] == 2, "<" if head[5] == 1 else ">"  # noqa: PLR2004 -- ELFCLASS64
    (start,) = struct.unpack_from(f"{order}{'Q' if is_64 else 'I'}", head, 32 if is_64 else 28)
    size, count = struct.unpack_from(f"{order}HH", head, 54 if is_64 else 42)
    form = f"{order}I4xQQ8xQ" if is_64 else f"{order}III4xI"
    for number in range(min(count, SEGMENTS_LIMIT)):
        place = start + number * size
        if place + struct.calcsize(form) <= len(head):
            yield _Segment(*struct.unpack_from(form, head, place))


def _dynamic_entries(
    reader: GuestReader, path: PurePosixPath, head: bytes, segments: list[_Segment]
) -> list[tuple[int, int]]:
    """Return tag and value of each entry of the dynamic section, or nothing without one."""
    segment = next((each for each in segments if each.kind == _DYNAMIC_SEGMENT), None)
    if segment is None:
        return []
    raw = _read(reader, path, segment.offset, min(segment.size, DYNAMIC_LIMIT))
    entry = f"{'<' if head[5] == 1 else '>'}{'QQ' if head[4] == 2 else 'II'}"  # noqa: PLR2004
    return list(struct.iter_unpack(entry, raw[: len(raw) - len(raw) % struct.calcsize(entry)]))


def _dynamic_names(
    reader: GuestReader,
    path: PurePosixPath,
    segments: list[_Segment],
    values: Mapping[int, int],
) -> bytes:
    """Return the dynamic section's string table, which the section gives by address."""
    address, size = values.get(_NAMES), values.get(_NAMES_SIZE, 0)
    for segment in segments:
        if (
            address is not None
            and segment.kind == _LOADED_SEGMENT
            and segment.address <= address < segment.address + segment.size
        ):
            offset = segment.offset + address - segment.address
            return _read(reader, path, offset, min(size, NAMES_LIMIT))
    return b""


def _read(reader: GuestReader, path: PurePosixPath, offset: int, size: int) -> bytes:
    return reader.read(path, limit=size, offset=offset) if offset < FILE_LIMIT else b""


def _name_at(names: bytes, offset: int) -> str:
    end = names.find(b"\0", offset, offset + PATH_LIMIT)
    return names[offset:end].decode("utf-8", "replace") if end >= 0 else ""
