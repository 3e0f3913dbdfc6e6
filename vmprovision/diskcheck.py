"""Is an image whole: its metadata, and a raw disk's partition table, against its file."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmprovision.diskchain import run_qemu_img, source
from vmprovision.diskformat import SECTOR
from vmprovision.errors import CommandError, ImageCorruptError

if TYPE_CHECKING:
    from vmprovision.diskchain import Layer
    from vmprovision.diskfile import DiskFile

CHECK_SECONDS = 300.0
_GPT_PROTECTIVE = 0xEE


def check_image(image: Layer) -> None:
    """Refuse an image that is truncated or whose metadata is damaged.

    ``qemu-img info`` is content with half an image; ``qemu-img check`` is not.

    Raises:
        ImageCorruptError: it is.
    """
    if not image.file.size:
        raise ImageCorruptError(f"{image.file} is empty", hint="get the image again")
    if image.format == "raw":
        _check_raw(image.file)
        return
    try:
        run_qemu_img(
            ["check", "-q", source(image)],
            [image],
            timeout=CHECK_SECONDS,
            accept=(0, 3),  # 3: leaked clusters, which lose space and nothing else
        )
    except CommandError as exc:
        raise _unopened(image, exc) from exc
    if image.format == "vdi":
        _check_vdi(image.file)


def _unopened(image: Layer, exc: CommandError) -> ImageCorruptError | CommandError:
    if not exc.stderr:  # qemu-img is missing or was too slow: no fault of the image
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
    """Compare a raw disk's partition table with the size of the file."""
    size = file.size
    start = file.read(2 * SECTOR)
    if size % SECTOR:
        raise ImageCorruptError(
            f"{file} is truncated: its size is not a multiple of {SECTOR} bytes",
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
            f"{file} is truncated: its partition table reaches to byte {end * SECTOR}, "
            f"the file ends at {size}",
            hint="get the image again",
        )
