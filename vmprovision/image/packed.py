"""Recognise files that only contain a disk image: archives, compressed images, old formats.

The magic numbers are those of file(1). Each hint is a command that the host has or gets
from the package of the same name.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmprovision.image.diskfile import DiskFile

_CONVERT = "convert it: qemu-img convert -f {driver} -O qcow2 {file} {stem}.qcow2"
_LATER = 32769  # offset of an ISO 9660 image's identifier
_TAR = 257
_FOOTER = 512

# The first bytes, what the file is, and how to get a disk image from it.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed with gzip", "unpack it: gzip -dk {file}"),
    (b"\x1f\x9d", "compressed with compress", "unpack it: gzip -dk {file}"),
    (b"BZh", "compressed with bzip2", "unpack it: bzip2 -dk {file}"),
    (b"\xfd7zXZ\0", "compressed with xz", "unpack it: xz -dk {file}"),
    (b"\x5d\0\0\x80\0", "compressed with lzma", "unpack it: xz -dk {file}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: zstd -d {file}"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it: lz4 -d {file}"),
    (b"LZIP", "compressed with lzip", "unpack it: lzip -dk {file}"),
    (b"\x89LZO", "compressed with lzop", "unpack it: lzop -d {file}"),
    (b"PK\3\4", "a zip archive", "unpack it: unzip {file}"),
    (b"PK\5\6", "an empty zip archive", "get the image again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x {file}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x {file}"),
    (b"070701", "a cpio archive", "unpack it: cpio -id < {file}"),
    (b"!<arch>\n", "a Debian package or an ar archive", "unpack it: ar x {file}"),
    (b"\xed\xab\xee\xdb", "an RPM package", "unpack it: rpm2cpio {file} | cpio -id"),
    (b"VMA\0", "a Proxmox backup", "unpack it: vma extract {file} {stem}"),
    (b"MSWIM\0\0\0", "a Windows image archive", "give a disk image of a Linux guest"),
    (b"\x3a\xff\x26\xed", "an Android sparse image", "unpack it: simg2img {file} {stem}.raw"),
    (b"EVF\x09\x0d\x0a\xff\0", "an EWF image", "unpack it: ewfexport {file}"),
    (b"conectix", "a VHD image", _CONVERT.replace("{driver}", "vpc")),
    (b"QED\0", "a QED image", _CONVERT.replace("{driver}", "qed")),
    (b"QFI\xfb\0\0\0\1", "a QCOW image of version 1", _CONVERT.replace("{driver}", "qcow")),
    (b"WithoutFreeSpace", "a Parallels image", _CONVERT.replace("{driver}", "parallels")),
    (b"WithouFreSpacExt", "a Parallels image", _CONVERT.replace("{driver}", "parallels")),
    (b"Bochs Virtual HD Image", "a Bochs image", _CONVERT.replace("{driver}", "bochs")),
    (b"#!/bin/sh\n#V2.0 Format", "a cloop image", _CONVERT.replace("{driver}", "cloop")),
    (b"xar!", "a xar archive", "unpack it: bsdtar -xf {file}"),
)


def recognise_packed(file: DiskFile, *, is_raw: bool) -> tuple[str, str] | None:
    """Return what an unusable file is and the next step, or None for any other file.

    Args:
        file: the file.
        is_raw: the caller states that the file is a raw disk. A raw disk may hold an ISO
            image's identifier, or end with the footer of a VHD.
    """
    start = file.read(_TAR + 8)
    for magic, what, step in _STARTS:
        if start.startswith(magic):
            return what, _for(file, step)
    if start[_TAR : _TAR + 5] == b"ustar":
        inside = ", then give the .vmdk that was in it" if file.path.suffix == ".ova" else ""
        return "a tar archive", _for(file, "unpack it: tar -xf {file}" + inside)
    found = None if is_raw else _recognise_elsewhere(file)
    return (found[0], _for(file, found[1])) if found else None


def _recognise_elsewhere(file: DiskFile) -> tuple[str, str] | None:
    footer = file.read(_FOOTER, max(0, file.size - _FOOTER))
    if footer.startswith(b"conectix"):
        return "a VHD image", _CONVERT.replace("{driver}", "vpc")
    if footer.startswith(b"koly"):
        return "a DMG image", _CONVERT.replace("{driver}", "dmg")
    if file.read(5, _LATER) == b"CD001":
        return "an ISO image", "give the disk of an installed guest, or --format raw"
    return None


def _for(file: DiskFile, step: str) -> str:
    path = file.path
    return step.format(file=shlex.quote(str(path)), stem=shlex.quote(str(path.with_suffix(""))))
