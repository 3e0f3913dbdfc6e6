"""Find the redo log that an interrupted run left beside an image, and check that it fits."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import ImageError, ImageRecoveryError
from vmprovision.image.diskfile import DiskFile
from vmprovision.image.header import qcow2_references
from vmprovision.image.redolog import MERGING, OPEN, SEALED, RedoLog, open_folder
from vmprovision.image.seal import read_record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.image.seal import Record

log = logging.getLogger(__name__)

_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def find_redo_log(
    image: DiskFile, disk_format: str | None, *, trust: bool = False
) -> Iterator[RedoLog | None]:
    """Open the complete redo log that an interrupted run left beside an image, if there is one.

    Args:
        image: the image, locked by this process.
        disk_format: its format, or None for the format that the redo log was made for.
        trust: accept a redo log whose seal this host cannot check.

    Raises:
        ImageRecoveryError: there is one, but the image has changed since, it is for another
            image, or this user did not seal it on this host.
    """
    with contextlib.ExitStack() as stack:
        folder = open_folder(stack, image.path)
        name = _complete_name(folder, image.path)
        if name is None:
            yield None
            return
        path = image.path.with_name(name)
        try:
            handle = os.open(name, _LOOK, dir_fd=folder)
        except OSError as exc:
            raise _foreign(path, image, f"cannot be opened: {exc.strerror}") from exc
        stack.callback(os.close, handle)
        file = DiskFile(path=path, handle=handle)
        _require_ours(file, image, trust=trust)
        record = read_record(file, trust=trust)
        if record is None and not trust:
            raise _foreign(path, image, "was not sealed by this user on this host")
        redo_log = RedoLog(folder, name, file, record)
        if record is not None:
            _require_fitting(redo_log, record, image, disk_format, trust=trust)
        yield redo_log


def remove_unfinished(image: Path) -> bool:
    """Delete the unfinished redo log of an image that is locked here; return if there was one."""
    leftover = image.with_name(image.name + OPEN)
    if not (leftover.is_symlink() or leftover.exists()):
        return False
    log.warning("%s: throwing away the unfinished redo log of an interrupted run", image)
    leftover.unlink()
    return True


def is_decided(record: Record) -> bool | None:
    """Return whether the leader of this redo log was sealed, or None if that is unknown.

    The leader is merged after all its followers. So while the
    leader is there without a sealed redo log, the group was never sealed.
    """
    leader = Path(record.leader)
    with contextlib.ExitStack() as stack:
        try:
            folder = open_folder(stack, leader)
            inode = os.stat(leader.name, dir_fd=folder, follow_symlinks=False).st_ino
            name = _complete_name(folder, leader)
            if inode != record.leader_inode or name is None:
                return False if inode == record.leader_inode else None
            handle = os.open(name, _LOOK, dir_fd=folder)
        except OSError:
            return None
        stack.callback(os.close, handle)
        found = read_record(DiskFile(path=leader.with_name(name), handle=handle), trust=False)
    return None if found is None else found.group == record.group


def _complete_name(folder: int, image: Path) -> str | None:
    """Return the name of the image's complete redo log in its folder, or None."""
    pattern = re.compile(re.escape(image.name + SEALED) + r"-\d+-\d+$")
    merging = image.name + MERGING
    names = os.listdir(folder)
    found = [name for name in names if name == merging or pattern.match(name)]
    return None if not found else merging if merging in found else min(found)


def _require_ours(file: DiskFile, image: DiskFile, *, trust: bool) -> None:
    """Raise an error if others could have written the redo log, or if it names another file."""
    status = os.fstat(file.handle)
    owners = (os.geteuid(), os.fstat(image.handle).st_uid)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners or status.st_mode & 0o022:
        raise _foreign(file.path, image, "is another user's, or others can write to it")
    try:
        references = qcow2_references(file)
    except ImageError as exc:
        raise _foreign(file.path, image, f"cannot be read: {exc.message}") from exc
    # earlier versions wrote the image's name into it; that name is not followed
    if references.data or (references.backing is not None and not trust):
        raise _foreign(file.path, image, "refers to another file, which no redo log does")


def _require_fitting(
    redo_log: RedoLog, record: Record, image: DiskFile, disk_format: str | None, *, trust: bool
) -> None:
    """Raise an error if the redo log was made for another image or format.

    A caller may state ``--format raw`` for any image. A merge would then overwrite the
    image's own header.
    """
    if disk_format is not None and record.format != disk_format:
        raise ImageRecoveryError(
            f"the redo log of {image} was made for a {record.format} image, not for {disk_format}",
            hint=f"state the true format: --format {record.format}",
        )
    status = os.fstat(image.handle)
    is_unchanged = (status.st_size, status.st_mtime_ns) == (record.size, record.mtime)
    if not redo_log.is_merging and not is_unchanged:
        raise ImageRecoveryError(
            f"{image} was changed after an injection was interrupted; "
            f"the redo log {redo_log.file.path.name} no longer fits it",
            hint=f"delete {redo_log.file} and inject again",
        )
    if redo_log.is_merging and not (is_unchanged or status.st_ino == record.inode or trust):
        raise ImageRecoveryError(
            f"{redo_log.file} was being merged into another file than {image}",
            hint=f"delete it; or, if {image} is a copy of that file, "
            f"run `vmprovision recover --trust-redo-log {image}`",
        )


def _foreign(path: Path, image: DiskFile, cause: str) -> ImageRecoveryError:
    state = (
        "the image may be half written, so restore it from a backup, if it is"
        if path.name.endswith(MERGING)
        else "the image itself is as it was"
    )
    return ImageRecoveryError(
        f"{path} is not a redo log that can be merged into {image}: it {cause}",
        hint="recover as the user and on the host that ran the injection; if you do not know "
        f"where the file comes from, delete it ({state}); if you know that it is a redo log of "
        f"this image, run `vmprovision recover --trust-redo-log {image}`",
    )
