"""Check what an image and its directory need before a redo log can be made."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING

from vmprovision.errors import ImageError, ImageNotFoundError, ImageReadOnlyError, ImageSpaceError
from vmprovision.image.redolog import SEALED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME_LIMIT = 255  # NAME_MAX of every filesystem that holds disk images


@contextlib.contextmanager
def host_failures(image: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the host into an error that names the image."""
    try:
        yield
    except OSError as exc:
        kind = ImageSpaceError if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ImageError
        raise kind(
            f"{image} cannot be used: {exc.strerror} ({exc.filename or 'host'})",
            hint="remove the cause and run the command again",
        ) from exc


def existing_image(path: Path) -> Path:
    """Return the image at path, links resolved.

    Raises:
        ImageNotFoundError: there is no regular file that this user can read.
    """
    try:
        image = path.resolve(strict=True)
        status = image.stat()
    except (OSError, RuntimeError) as exc:
        raise ImageNotFoundError(f"there is no image at {path}", hint="check the path") from exc
    if not stat.S_ISREG(status.st_mode):
        raise ImageNotFoundError(
            f"{path} is not a disk image file", hint="give a regular file, or a directory tree"
        )
    if not os.access(image, os.R_OK):
        raise ImageNotFoundError(f"{path} cannot be read by this user", hint="check its mode")
    return image


def require_writable(image: Path) -> None:
    """Raise an error if an image is read-only, or no redo log can be made beside it.

    Raises:
        ImageReadOnlyError: the image or its folder cannot be written to.
    """
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    if not image.stat().st_mode & writable:  # root ignores modes, but the mode asks for no writes
        raise ImageReadOnlyError(
            f"{image} is read-only",
            hint="make it writable with chmod u+w, or write a new image with --output",
        )
    if not os.access(image.parent, os.W_OK):
        raise ImageReadOnlyError(
            f"the redo log of {image} cannot be written beside it: {image.parent} is not writable",
            hint="move the image, or write a new one elsewhere with --output",
        )


def require_absent(output: Path) -> None:
    """Raise an error if the new image exists already or cannot be created.

    Raises:
        ImageError: the path exists.
        ImageReadOnlyError: its directory is not writable.
    """
    if output.exists() or output.is_symlink():
        raise ImageError(f"{output} exists already", hint="choose another --output")
    if not os.access(output.absolute().parent, os.W_OK):
        raise ImageReadOnlyError(f"{output} cannot be created in its directory")


def require_short_name(image: Path) -> None:
    """Raise an error if the image's name is too long for the redo log's longest suffix."""
    longest = f"{SEALED}-{1 << 63}-{1 << 63}"
    if len(os.fsencode(image.name)) + len(longest) > NAME_LIMIT:
        raise ImageError(
            f"the name of {image} is too long for a redo log beside it",
            hint=f"give it a name of at most {NAME_LIMIT - len(longest)} bytes",
        )


def require_room(beside: Path, needed: int) -> None:
    """Raise an error if the filesystem of this path has fewer free bytes than needed.

    Raises:
        ImageSpaceError: it has fewer.
    """
    free = shutil.disk_usage(beside.absolute().parent).free
    if free < needed:
        raise ImageSpaceError(
            f"{beside.absolute().parent} has {free >> 20} MiB free, "
            f"the redo log of {beside.name} needs {needed >> 20}",
            hint="free some space, or write a new image elsewhere with --output",
        )
