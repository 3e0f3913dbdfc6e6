"""Write a new image from an image and its redo log, for ``--output``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError, ImageError, ImageSpaceError
from vmprovision.host.sync import sync_path
from vmprovision.image.chain import run_qemu_img, source
from vmprovision.image.diskfile import name_of
from vmprovision.image.preconditions import require_absent
from vmprovision.image.redolog import MERGE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.image.chain import Layer
    from vmprovision.image.diskfile import DiskFile

PARTIAL = ".vmprovision-new"


def write_new_image(layer: Layer, base: DiskFile, new: Path, disk_format: str) -> None:
    """Write the image with its redo log to a new file, which stays private until it is complete."""
    folder = new.with_name(new.name + PARTIAL)
    try:
        with _private_folder(folder) as handle:
            partial = Path(name_of(handle)) / new.name
            run_qemu_img(
                ["convert", "-O", disk_format, source(layer), str(partial)],
                [layer],
                timeout=MERGE_SECONDS,
                keep=[handle],
            )
            written = os.open(partial, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # few images have any
                    os.removexattr(written, "system.posix_acl_access")
                os.fchmod(written, _mode_like(base, written))
                os.fsync(written)
            finally:
                os.close(written)
            _put_in_place(partial, new)
        sync_path(new.parent)
    except (CommandError, OSError) as exc:
        cause = exc.message if isinstance(exc, CommandError) else exc.strerror
        full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = ImageSpaceError if full or "No space left" in str(cause) else ImageError
        raise kind(
            f"the new image {new} cannot be written: {cause}",
            hint="remove the cause and run the command again",
        ) from exc


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[int]:
    """Open a new folder for this user alone, after removing what a killed run left of it."""
    _remove_folder(path)
    path.mkdir(mode=0o700)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ImageError(f"{path} is another user's", hint="choose another --output")
        yield handle
    finally:
        os.close(handle)
        _remove_folder(path)


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.lstat().st_uid == os.geteuid():
            shutil.rmtree(path)


def _mode_like(old: DiskFile, new: int) -> int:
    """Return a mode that lets only those read the new image who can read the old one."""
    was, now = os.fstat(old.handle), os.fstat(new)
    mode = was.st_mode
    if was.st_gid != now.st_gid:  # the old group's members count as others for the new image
        mode &= ~0o070 | (mode & 0o007) << 3
    return mode & now.st_mode & 0o666 | 0o600


def _put_in_place(partial: Path, new: Path) -> None:
    """Give the complete file its name; never replace a file that has appeared there."""
    try:
        os.link(partial, new)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        require_absent(new)  # a filesystem without hard links
        partial.rename(new)
