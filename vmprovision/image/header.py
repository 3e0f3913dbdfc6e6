"""Read the header of a disk image before QEMU opens the file.

An image is hostile input. A qcow2 header may name any file of the host as its backing
or data file. A raw image's guest may write such a header into its own first sector. So
a format is never guessed from content alone, and no reference is followed unless the
caller allows it.

Formats: qcow2 by QEMU's ``docs/interop/qcow2.txt``; VMDK by its ``block/vmdk.c``. VDI
and VHDX refer to nothing that QEMU follows, and are recognised by their magic numbers.
"""

from __future__ import annotations

import array
import os
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.errors import ImageCorruptError, ImageFormatError, ImageReferenceError
from vmprovision.image.packed import recognise_packed

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.image.diskfile import DiskFile

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
SECTOR = 512

# The suffixes that state a format; `.img` and `.bin` state none.
_EXTENSIONS = {".raw": "raw", **{f".{name}": name for name in FORMATS}, ".qcow": "qcow"}
_QCOW2_DIRTY = 1 << 0
_QCOW2_EXTERNAL_DATA = 1 << 2
_QCOW2_CORRUPT = 1 << 1
_QCOW2_LARGEST_CLUSTER = 2 << 20
_QCOW2_NAME_LIMIT = 1023
_QCOW2_TABLE_LIMIT = 1 << 22  # entries of the L1 table, QEMU's own limit
_QCOW2_TABLE_SPARE = 1 << 15  # spare entries; saved VM states lie after the disk's end
_VMDK_DESCRIPTOR_LIMIT = 1 << 20
# What QEMU's sscanf(3) matches (line breaks count as spaces), in linear time.
_VMDK_EXTENT = re.compile(rb'RW\s+[+-]?\d+\s*\S{1,9}\s*"([^"\r\n]*)')
_VMDK_EXTENTS_LIMIT = 512
_VMDK_COMPRESSED = 1 << 16
_EXTENSION_END = 0x00000000
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSION_BACKING_FORMAT = 0xE2792ACA


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """The other files that an image refers to, by the names in its header."""

    backing: str | None = None
    backing_format: str | None = None
    data: tuple[str, ...] = ()


def header_format(file: DiskFile) -> str | None:
    """Return the format whose magic number the file begins with, or None."""
    start = file.read(128)
    if start.startswith(b"QFI\xfb"):
        return "qcow2" if start[4:8] in (b"\0\0\0\2", b"\0\0\0\3") else "qcow"
    if start.startswith((b"KDMV", b"# Disk DescriptorFile")):
        return "vmdk"
    if start[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    return "vhdx" if start.startswith(b"vhdxfile") else None


def named_format(path: Path) -> str | None:
    """Return the format that the file's suffix states, or None."""
    return _EXTENSIONS.get(path.suffix.lower())


def determine_format(file: DiskFile, stated: str | None) -> str:
    """Return the format to open the image with: the stated one, else by suffix and header.

    Raises:
        ImageFormatError: neither the caller nor the suffix states it, or the header
            disagrees.
    """
    seen = header_format(file)
    packed = recognise_packed(file, is_raw=stated == "raw")
    if packed is not None:
        what, step = packed
        raise ImageFormatError(f"{file} is {what}, not a supported disk image", hint=step)
    if stated is not None:
        if stated not in FORMATS:
            raise ImageFormatError(
                f"{file}: unsupported disk format {stated}", hint=f"supported: {', '.join(FORMATS)}"
            )
        if stated not in ("raw", seen):
            raise ImageFormatError(
                f"{file} is not a {stated} image: its header says {seen or 'nothing'}",
                hint="state the true format with --format",
            )
        return stated
    named = named_format(file.path)
    if named in FORMATS and named == (seen or "raw"):
        return named
    says = f"its header says {seen}" if seen else "it has no header of a supported format"
    calls = (
        f"its name says {named}"
        if named
        else f"its name ({file.path.suffix or 'no suffix'}) does not say"
    )
    raise ImageFormatError(
        f"{file}: cannot tell the disk format: {calls}, {says}",
        hint=f"state it with --format {seen or 'raw'} if you trust the file to be that",
    )


def qcow2_references(file: DiskFile) -> References:
    """Return the backing and data files that a qcow2 header names, without opening them.

    The whole first cluster is read, exactly as QEMU's ``qcow2_do_open`` reads it.
    Otherwise QEMU could open a name that was never checked.

    Raises:
        ImageCorruptError: the header is cut off, inconsistent, or marked corrupt.
        ImageFormatError: the image is encrypted.
        ImageReferenceError: its data is in another file, which the header does not name.
    """
    start = file.read(_QCOW2_LARGEST_CLUSTER)
    try:
        version, name_offset, name_size, cluster_bits = struct.unpack_from(">4xIQII", start)
        (crypt,) = struct.unpack_from(">I", start, 32)
        incompatible, length = 0, 72
        if version >= 3:  # noqa: PLR2004 -- the format's version 3
            (incompatible,) = struct.unpack_from(">Q", start, 72)
            (length,) = struct.unpack_from(">I", start, 100)
        start = start[: 1 << min(cluster_bits, 21)]
        extensions = _qcow2_extensions(start, length, name_offset or len(start))
        backing = _qcow2_backing(start, name_offset, name_size)
        data = os.fsdecode(extensions.get(_EXTENSION_DATA_FILE, b""))
        backing_format = extensions.get(_EXTENSION_BACKING_FORMAT, b"").decode("ascii")
    except (struct.error, ValueError) as exc:
        raise ImageCorruptError(
            f"{file}: the qcow2 header is cut off or damaged", hint="get the image again"
        ) from exc
    if crypt:
        raise ImageFormatError(
            f"{file} is an encrypted qcow2 image", hint="decrypt it with qemu-img convert"
        )
    if incompatible & _QCOW2_CORRUPT:
        raise ImageCorruptError(
            f"{file} is marked as corrupt", hint="repair a copy with qemu-img check -r all"
        )
    elsewhere = bool(incompatible & _QCOW2_EXTERNAL_DATA)
    if elsewhere and not data:
        raise ImageReferenceError(
            f"{file} keeps its data in another file and does not name it",
            hint="merge it with qemu-img convert",
        )
    return References(
        backing=backing,
        backing_format=backing_format or None,
        data=(data,) if elsewhere else (),
    )


def is_unclean(file: DiskFile) -> bool:
    """Return whether a qcow2 was not closed, so that QEMU has yet to rebuild its refcounts."""
    version, features = struct.unpack_from(">4xI64xQ", file.read(80).ljust(80, b"\0"))
    return version >= 3 and bool(features & _QCOW2_DIRTY)  # noqa: PLR2004 -- the format's version 3


def require_sound_table(file: DiskFile) -> None:
    """Raise an error if a qcow2's table names more clusters than the file has.

    QEMU would look into each of them, which could take hours.

    Raises:
        ImageCorruptError: the table names more.
    """
    cluster_bits, size, entries, place = struct.unpack_from(
        ">20xIQ4xIQ", file.read(48).ljust(48, b"\0")
    )
    needed = (size >> max(0, 2 * min(cluster_bits, 21) - 3)) + 1
    table = array.array("Q", b"")
    if entries <= _QCOW2_TABLE_LIMIT:
        content = file.read(entries * table.itemsize, place)
        table.frombytes(content[: len(content) // table.itemsize * table.itemsize])
    used = len(table) - table.count(0)
    blocks = os.fstat(file.handle).st_blocks
    if entries > min(2 * needed + _QCOW2_TABLE_SPARE, _QCOW2_TABLE_LIMIT) or used > blocks + (
        _QCOW2_TABLE_SPARE
    ):
        raise ImageCorruptError(
            f"{file} is damaged: its table of clusters is larger than its disk needs",
            hint="get the image again",
        )


def _qcow2_backing(start: bytes, offset: int, size: int) -> str | None:
    """Return the backing file's name, or None if the image has none.

    Raises:
        ValueError: the name is longer than QEMU allows, or is not inside the header.
    """
    if not offset or not size:
        return None
    name = start[offset : offset + size]
    if size > _QCOW2_NAME_LIMIT or len(name) != size:
        raise ValueError("the backing file's name is not in the header")
    return os.fsdecode(name)


def _qcow2_extensions(start: bytes, offset: int, end: int) -> dict[int, bytes]:
    """Return the header extensions by type; of two of the same type, the later one.

    Raises:
        ValueError: an extension goes beyond the end of the header.
    """
    found = {}
    while offset < end:
        kind, size = struct.unpack_from(">II", start, offset)
        offset += 8
        if size > end - offset or offset + size > len(start):
            raise ValueError("a header extension is too large")
        if kind == _EXTENSION_END:
            break
        found[kind] = start[offset : offset + size]
        offset += (size + 7) // 8 * 8
    return found


def read_references(file: DiskFile, disk_format: str) -> References:
    """Return the other files that an image names.

    Raises:
        ImageError: the header is damaged, or names a file that must not be followed.
    """
    if disk_format == "qcow2":
        return qcow2_references(file)
    if disk_format == "vmdk":
        return _vmdk_references(file)
    return References()


def _vmdk_references(file: DiskFile) -> References:
    """Return the files beside a VMDK that hold its data.

    The descriptor is read as QEMU's ``block/vmdk.c`` reads it. QEMU opens every extent
    that it names, and takes ``parentFileNameHint`` for a backing file even if
    ``parentCID`` says that there is none.

    Raises:
        ImageReferenceError: the VMDK has a parent.
        ImageFormatError: the VMDK cannot be written in place.
    """
    start = file.read(_VMDK_DESCRIPTOR_LIMIT)
    sparse = start.startswith(b"KDMV")
    descriptor = start[SECTOR : SECTOR * 21] if sparse else start
    if b"parentFileNameHint" in descriptor:
        raise ImageReferenceError(
            f"{file} is a VMDK with a parent", hint="merge it with qemu-img convert"
        )
    if b"streamOptimized" in descriptor or (sparse and _vmdk_header(file)[0] & _VMDK_COMPRESSED):
        raise ImageFormatError(
            f"{file} is a stream-optimized VMDK, which cannot be written in place",
            hint="convert it first: qemu-img convert -O qcow2",
        )
    if sparse:
        refuse_nested_vmdk(file)
        return References()
    names = _VMDK_EXTENT.findall(descriptor)
    if len(names) > _VMDK_EXTENTS_LIMIT:
        raise ImageFormatError(
            f"{file} is a VMDK in more than {_VMDK_EXTENTS_LIMIT} pieces",
            hint="convert it first: qemu-img convert -O qcow2",
        )
    return References(data=tuple(map(os.fsdecode, names)))


def _vmdk_header(file: DiskFile) -> tuple[int, int]:
    """Return flags and capacity of a sparse extent; capacity 1 for any other file.

    Raises:
        ImageCorruptError: the header is cut off.
    """
    start = file.read(SECTOR)
    if not start.startswith(b"KDMV"):
        return 0, 1
    try:
        flags, capacity = struct.unpack_from("<8xIQ", start)
    except struct.error as exc:
        raise ImageCorruptError(
            f"{file}: the VMDK header is cut off", hint="get the image again"
        ) from exc
    return flags, capacity


def refuse_nested_vmdk(file: DiskFile) -> None:
    """Raise an error for a sparse extent whose descriptor names other files, which QEMU opens.

    Raises:
        ImageReferenceError: it is such an extent.
    """
    if _vmdk_header(file)[1] == 0:
        raise ImageReferenceError(
            f"{file} is a VMDK whose data is in files that it names inside",
            hint="merge it with qemu-img convert",
        )
