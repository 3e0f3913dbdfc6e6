"""Check that an image is whole: its metadata, and a raw disk's partition table."""

from __future__ import annotations

import logging
import shlex
import struct
from typing import TYPE_CHECKING

from vmprovision.disklayout.partitions import LARGE_SECTOR, sector_size
from vmprovision.errors import CommandError, ImageCorruptError
from vmprovision.image.chain import run_qemu_img, source
from vmprovision.image.header import SECTOR, is_unclean, require_sound_table

if TYPE_CHECKING:
    from vmprovision.image.chain import Layer
    from vmprovision.image.diskfile import DiskFile

log = logging.getLogger(__name__)

CHECK_SECONDS = 45.0
CHECK_RATE = 4 << 30  # bytes of an image for which it gets another second
LONGEST_CHECK = 300.0
CHECK_MEMORY = 1 << 30  # of address space; 16 TiB in clusters of the usual size need half of it
_GPT_PROTECTIVE = 0xEE
_GPT = b"EFI PART"
_LEAKS = 3  # exit status: leaked clusters, but no other error
_JOURNAL = "needs to be replayed"  # QEMU's message for a VHDX that was not closed


def check_image(image: Layer, *, write: bool = False, repair: bool = False) -> None:
    """Raise an error if an image is truncated, was not closed, or has damaged metadata.

    ``qemu-img info`` accepts a truncated image, so this uses ``qemu-img check``.

    Args:
        image: the image.
        write: the image will be written to. An image that was not closed can still be read.
        repair: let QEMU repair an image whose machine was killed.

    Raises:
        ImageCorruptError: the image is damaged.
    """
    if not image.file.size:
        raise ImageCorruptError(f"{image.file} is empty", hint="get the image again")
    if image.format == "raw":
        _check_raw(image.file)
        return
    if image.format == "qcow2":
        require_sound_table(image.file)
        if is_unclean(image.file):
            if not write:
                log.warning("%s was not closed by its machine, and is read as it is", image.file)
                return
            _repair(image, wanted=repair)
    try:
        _qemu_check(image)
    except CommandError as exc:
        if _JOURNAL not in exc.stderr:
            raise _unopened(image, exc) from exc
        _repair(image, wanted=repair and write)
    if image.format == "vdi":
        _check_vdi(image.file)


def has_leaks(image: Layer) -> bool:
    """Return whether the image has clusters that are allocated but not used.

    Raises:
        CommandError: the image has other damage.
    """
    return _qemu_check(image) == _LEAKS


def repair_leaks(image: Layer) -> None:
    """Free the clusters that are allocated but not used.

    Raises:
        CommandError: qemu-img cannot repair the image.
    """
    _qemu_check(image, "-r", "leaks")


def _qemu_check(image: Layer, *repair: str) -> int:
    done = run_qemu_img(
        ["check", "-q", *repair, source(image)],
        [image],
        timeout=min(LONGEST_CHECK, CHECK_SECONDS + image.file.used / CHECK_RATE),
        accept=(0, _LEAKS),
        memory=CHECK_MEMORY,
    )
    return done.returncode


def _repair(image: Layer, *, wanted: bool) -> None:
    """Let QEMU repair the metadata of an image whose machine was killed; guest data is unchanged.

    Raises:
        ImageCorruptError: a repair was not requested, or fails.
    """
    if not wanted:
        raise ImageCorruptError(
            f"{image.file} was not closed, most likely because its machine was killed; "
            "QEMU can repair that",
            hint=f"add --repair, or run qemu-img check -r all {shlex.quote(str(image.file))}",
        )
    log.warning("%s was not closed by its machine, and is repaired", image.file)
    try:
        _qemu_check(image, "-r", "all")
    except CommandError as exc:
        raise _unopened(image, exc) from exc


def _unopened(image: Layer, exc: CommandError) -> ImageCorruptError | CommandError:
    if not exc.stderr:  # qemu-img is missing or was too slow, so the image is not to blame
        return exc
    lines = exc.stderr.strip().splitlines()
    cause = lines[0] if lines else exc.message
    return ImageCorruptError(
        f"{image.file} is truncated or damaged as a {image.format} image: {cause}",
        hint="get the image again, or repair a copy with qemu-img check -r all",
    )


def _check_vdi(file: DiskFile) -> None:
    header = file.read(SECTOR)
    (data,) = struct.unpack_from("<I", header, 0x158)
    block, allocated = struct.unpack_from("<I8xI", header, 0x178)
    if data + block * allocated > file.size:
        raise ImageCorruptError(
            f"{file} is truncated: its header counts more blocks than the file holds",
            hint="get the image again",
        )


def _check_raw(file: DiskFile) -> None:
    """Compare the partition table of a raw disk with the size of the file.

    Some tools make files that end with part of a sector. Such a file counts as whole if
    the table fits in it, because QEMU reads the rest as zeros.
    """
    start = file.read(2 * LARGE_SECTOR)
    end = _end_of_table(start, sector_size(start, lambda place, size: file.read(size, place)))
    if end > file.size:
        raise ImageCorruptError(
            f"{file} is truncated: its partition table reaches to byte {end}, "
            f"the file ends at {file.size}",
            hint="get the image again",
        )


def _end_of_table(start: bytes, sector: int) -> int:
    """Return the byte after the last partition or the backup GPT; 0 if there is no table."""
    if start[sector : sector + 8] == _GPT and len(start) >= sector + 40:
        (backup,) = struct.unpack_from("<Q", start, sector + 32)
        return (int(backup) + 1) * sector
    end = 0
    if start[510:512] == b"\x55\xaa" and start[3:11] not in (b"NTFS    ", b"EXFAT   "):
        for entry in range(446, 510, 16):
            kind, first, count = struct.unpack_from("<4xB3xII", start, entry)
            if kind not in (0, _GPT_PROTECTIVE) and start[entry] in (0, 0x80):
                end = max(end, first + count)
    return end * sector
