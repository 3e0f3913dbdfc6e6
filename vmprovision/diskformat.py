"""What a disk image's own header says, read with care before QEMU opens the file.

An image is hostile input: a qcow2 header may name any file of the host as its
backing or data file, and a raw image's guest may write such a header into its
own first sector.  So a format is never guessed from content alone, and no
reference is followed that the caller did not allow.

Formats: qcow2 by QEMU's ``docs/interop/qcow2.txt``; VMDK by its ``block/vmdk.c``; VDI
and VHDX, which can refer to nothing that QEMU follows, by their magic numbers.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.command import run
from vmprovision.errors import (
    CommandError,
    ImageCorruptError,
    ImageFormatError,
    ImageReferenceError,
)

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx")
CHECK_SECONDS = 300.0
SECTOR = 512
CHAIN_LIMIT = 32

# The names by which a file says what it is; `.img` and `.bin` say nothing.
_EXTENSIONS = {".raw": "raw", **{f".{name}": name for name in FORMATS}, ".qcow": "qcow"}
_QCOW2_EXTERNAL_DATA = 1 << 2
_QCOW2_CORRUPT = 1 << 1
_QCOW2_LARGEST_CLUSTER = 2 << 20
_QCOW2_NAME_LIMIT = 1023
_VMDK_DESCRIPTOR_LIMIT = 1 << 20
# Wider than QEMU's own pattern: sscanf(3) takes line breaks for spaces.
_VMDK_EXTENT = re.compile(rb'RW\s[^"]*"([^"\r\n]*)')
_VMDK_COMPRESSED = 1 << 16
_EXTENSION_END = 0x00000000
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_GPT_PROTECTIVE = 0xEE


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """The other files that an image names, as it names them."""

    backing: str | None = None
    backing_format: str | None = None
    data: tuple[str, ...] = ()


def header_format(path: Path) -> str | None:
    """The format whose magic number the file begins with; None where it has none of ours."""
    with path.open("rb") as file:
        start = file.read(128)
    if start.startswith(b"QFI\xfb"):
        return "qcow2" if start[4:8] in (b"\0\0\0\2", b"\0\0\0\3") else "qcow"
    if start.startswith((b"KDMV", b"# Disk DescriptorFile")):
        return "vmdk"
    if start[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    return "vhdx" if start.startswith(b"vhdxfile") else None


def named_format(path: Path) -> str | None:
    """The format that a file's name says it has; None where the name does not say."""
    return _EXTENSIONS.get(path.suffix.lower())


def determine_format(path: Path, stated: str | None) -> str:
    """The format to open the image with: the caller's word, else name and header together.

    Raises:
        ImageFormatError: neither the caller nor the name says, or they disagree
            with the header.
    """
    seen = header_format(path)
    if stated is not None:
        if stated not in FORMATS:
            raise ImageFormatError(
                f"{path}: unknown disk format {stated}", hint=f"known are {', '.join(FORMATS)}"
            )
        if stated not in ("raw", seen):
            raise ImageFormatError(
                f"{path} is no {stated} image: its header says {seen or 'nothing'}",
                hint="state the true format with --format",
            )
        return stated
    named = named_format(path)
    if named in FORMATS and named == (seen or "raw"):
        return named
    says = f"its header says {seen}" if seen else "it has no header of a known format"
    calls = (
        f"its name says {named}"
        if named
        else f"its name ({path.suffix or 'no suffix'}) does not say"
    )
    raise ImageFormatError(
        f"{path}: cannot tell the disk format: {calls}, {says}",
        hint=f"state it with --format {seen or 'raw'} if you trust the file to be that",
    )


def qcow2_references(path: Path) -> References:
    """The backing and data files that a qcow2 header names, without opening them.

    Read exactly as QEMU's ``qcow2_do_open`` reads it, all of the first cluster:
    a name that the two understood differently would be a name nobody checked.

    Raises:
        ImageCorruptError: the header is cut off, inconsistent, or marked corrupt.
        ImageFormatError: the image is encrypted.
        ImageReferenceError: its data is in a file that it does not name.
    """
    with path.open("rb") as file:
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
        data = extensions.get(_EXTENSION_DATA_FILE, b"").decode("utf-8")
        backing_format = extensions.get(_EXTENSION_BACKING_FORMAT, b"").decode("ascii")
    except (struct.error, ValueError) as exc:
        raise ImageCorruptError(
            f"{path}: the qcow2 header is cut off or damaged", hint="get the image again"
        ) from exc
    if crypt:
        raise ImageFormatError(
            f"{path} is an encrypted qcow2 image", hint="decrypt it with qemu-img convert"
        )
    if incompatible & _QCOW2_CORRUPT:
        raise ImageCorruptError(
            f"{path} is marked as corrupt", hint="repair a copy with qemu-img check -r all"
        )
    elsewhere = bool(incompatible & _QCOW2_EXTERNAL_DATA)
    if elsewhere and not data:
        raise ImageReferenceError(
            f"{path} keeps its data in another file and does not name it",
            hint="merge it with qemu-img convert",
        )
    return References(
        backing=backing,
        backing_format=backing_format or None,
        data=(data,) if elsewhere else (),
    )


def _qcow2_backing(start: bytes, offset: int, size: int) -> str | None:
    """The backing file's name; None where there is none.

    Raises:
        ValueError: it is longer than QEMU allows, not all in the header, or no text.
    """
    if not offset or not size:
        return None
    name = start[offset : offset + size]
    if size > _QCOW2_NAME_LIMIT or len(name) != size:
        raise ValueError("the backing file's name is not in the header")
    return name.decode("utf-8")


def _qcow2_extensions(start: bytes, offset: int, end: int) -> dict[int, bytes]:
    """The header extensions by their kind, of two of one kind the later.

    Raises:
        ValueError: one does not end where the extensions end.
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


def check_references(path: Path, disk_format: str, *, allow_outside: bool) -> tuple[Path, ...]:
    """The chain of an image's backing files, each reference to another file looked at.

    Raises:
        ImageReferenceError: a reference is no plain file name, leads out of the
            image's folder, has no stated format, or is a circle.
        ImageCorruptError: a header of the chain is damaged.
    """
    folder = path.parent.resolve()
    chain: list[Path] = []
    current, current_format = path, disk_format
    for _ in range(CHAIN_LIMIT):
        references = _references(current, current_format)
        names = [*references.data, *([references.backing] if references.backing else [])]
        for name in names:
            _allowed(current, name, folder, allow_outside=allow_outside)
            if current_format == "vmdk":
                _refuse_nested_vmdk(current.parent / name)
        if references.backing is None:
            return tuple(chain)
        if references.backing_format not in FORMATS:
            raise ImageReferenceError(
                f"{current} names the backing file {references.backing} without a format we know",
                hint="state it: qemu-img rebase -u -F FORMAT -b BACKING IMAGE",
            )
        current = current.parent / references.backing
        chain.append(current)
        current_format = references.backing_format
    raise ImageReferenceError(
        f"{path}: its chain of backing files has no end",
        hint="look at it with qemu-img info -U, and mend or merge it",
    )


def _references(path: Path, disk_format: str) -> References:
    if disk_format == "qcow2":
        return qcow2_references(path)
    if disk_format == "vmdk":
        return _vmdk_references(path)
    return References()


def _vmdk_references(path: Path) -> References:
    """The files that hold a VMDK's data beside it.

    Read here as QEMU's ``block/vmdk.c`` reads it, since QEMU opens every extent
    that a descriptor names, and takes ``parentFileNameHint`` for a backing file
    even where ``parentCID`` says that there is none.

    Raises:
        ImageReferenceError: it has a parent.
        ImageFormatError: it cannot be written in place.
    """
    with path.open("rb") as file:
        start = file.read(_VMDK_DESCRIPTOR_LIMIT)
    sparse = start.startswith(b"KDMV")
    descriptor = start[SECTOR : SECTOR * 21] if sparse else start
    if b"parentFileNameHint" in descriptor:
        raise ImageReferenceError(
            f"{path} is a VMDK with a parent", hint="merge it with qemu-img convert"
        )
    if b"streamOptimized" in descriptor or (sparse and _vmdk_header(path)[0] & _VMDK_COMPRESSED):
        raise ImageFormatError(
            f"{path} is a stream-optimized VMDK, which cannot be written in place",
            hint="convert it first: qemu-img convert -O qcow2",
        )
    if sparse:
        _refuse_nested_vmdk(path)
        return References()
    names = [name.decode("utf-8", errors="replace") for name in _VMDK_EXTENT.findall(descriptor)]
    return References(data=tuple(names))


def _vmdk_header(path: Path) -> tuple[int, int]:
    """Flags and capacity of a sparse extent; a capacity of one where it is none.

    Raises:
        ImageCorruptError: the header is cut off.
    """
    with path.open("rb") as file:
        start = file.read(SECTOR)
    if not start.startswith(b"KDMV"):
        return 0, 1
    try:
        flags, capacity = struct.unpack_from("<8xIQ", start)
    except struct.error as exc:
        raise ImageCorruptError(
            f"{path}: the VMDK header is cut off", hint="get the image again"
        ) from exc
    return flags, capacity


def _refuse_nested_vmdk(path: Path) -> None:
    """Refuse a sparse extent without a size of its own: QEMU opens what a descriptor in it names.

    Raises:
        ImageReferenceError: it is one.
    """
    if _vmdk_header(path)[1] == 0:
        raise ImageReferenceError(
            f"{path} is a VMDK whose data is in files that it names inside",
            hint="merge it with qemu-img convert",
        )


def _allowed(image: Path, name: str, folder: Path, *, allow_outside: bool) -> None:
    if not name or "\0" in name or ":" in name.partition("/")[0]:
        raise ImageReferenceError(
            f"{image} refers to {name or 'nothing'}, which is no plain file name",
            hint="only files are followed; merge the image with qemu-img convert",
        )
    try:
        target = (image.parent / name).resolve()
        there = target.is_file()
    except (OSError, RuntimeError):  # too long a name, or a circle of links
        there = False
    if not there:
        raise ImageReferenceError(
            f"{image} refers to {name}, which is not a file",
            hint="put that file where the image looks for it",
        )
    if not allow_outside and target.parent != folder:
        raise ImageReferenceError(
            f"{image} refers to {target}, outside the image's folder",
            hint="if you trust the image, allow it with --allow-backing",
        )


def check_image(path: Path, disk_format: str) -> None:
    """Refuse an image that is truncated or whose metadata is damaged.

    ``qemu-img info`` is content with half an image; ``qemu-img check`` is not.

    Raises:
        ImageCorruptError: it is.
    """
    if path.stat().st_size == 0:
        raise ImageCorruptError(f"{path} is empty", hint="get the image again")
    if disk_format == "raw":
        _check_raw(path)
        return
    try:
        run(
            ["qemu-img", "check", "-U", "-q", "-f", disk_format, f"{path.absolute()}"],
            timeout=CHECK_SECONDS,
            accept=(0, 3),  # 3: leaked clusters, which lose space and nothing else
        )
    except CommandError as exc:
        raise _unopened(path, disk_format, exc) from exc
    if disk_format == "vdi":
        _check_vdi(path)


def _unopened(path: Path, disk_format: str, exc: CommandError) -> ImageCorruptError | CommandError:
    if not exc.stderr:  # qemu-img is missing or was too slow: no fault of the image
        return exc
    lines = exc.stderr.strip().splitlines()
    return ImageCorruptError(
        f"{path} is truncated or damaged as a {disk_format} image: {lines[0] if lines else exc}",
        hint="get the image again, or repair a copy with qemu-img check -r all",
    )


def _check_vdi(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(SECTOR)
    (data,) = struct.unpack_from("<I", header, 0x158)
    block, allocated = struct.unpack_from("<I8xI", header, 0x178)
    if data + block * allocated > path.stat().st_size:
        raise ImageCorruptError(
            f"{path} is truncated: its header counts more blocks than the file holds",
            hint="get the image again",
        )


def _check_raw(path: Path) -> None:
    """Compare a raw disk's partition table with the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(2 * SECTOR)
    if size % SECTOR:
        raise ImageCorruptError(
            f"{path} is truncated: its size is not a multiple of {SECTOR} bytes",
            hint="get the image again",
        )
    end = 0
    if start[SECTOR : SECTOR + 8] == b"EFI PART":
        (backup,) = struct.unpack_from("<Q", start, SECTOR + 32)
        end = backup + 1
    elif start[510:512] == b"\x55\xaa" and start[3:11] not in (b"NTFS    ", b"EXFAT   "):
        for entry in range(446, 510, 16):
            kind, first, count = struct.unpack_from("<4xB3xII", start, entry)
            if kind not in (0, _GPT_PROTECTIVE) and start[entry] in (0, 0x80):
                end = max(end, first + count)
    if end * SECTOR > size:
        raise ImageCorruptError(
            f"{path} is truncated: its partition table reaches to byte {end * SECTOR}, "
            f"the file ends at {size}",
            hint="get the image again",
        )
