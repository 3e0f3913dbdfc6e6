"""The redo log: a file beside an image that takes all writes, until they are merged.

It is a qcow2 overlay that names no other file: what it lies over is told to QEMU,
as an open file, whenever it is opened.  Its own name says where the work stands,
and a name changes atomically:

``IMAGE.vmprovision-open``
    being written; whoever finds it later throws it away.
``IMAGE.vmprovision-sealed-SIZE-MTIME``
    complete and verified; the image was so large and so old when it was sealed.
    Merging has not begun, so an image that differs by now was changed by somebody
    else, and the redo log no longer fits it.
``IMAGE.vmprovision-merging``
    being merged with ``qemu-img commit``, which may be repeated any number of
    times; the image is whole again when that has ended.

A guest may lie on several images, whose redo logs are sealed together.  That of one
of them, the leader, is sealed last and merged last: its new name is the moment from
which all of them are complete, and a redo log that follows a leader counts as long
as the leader's is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from typing import TYPE_CHECKING

from vmprovision.errors import (
    CommandError,
    ImageError,
    ImageLockedError,
    ImageRecoveryError,
)
from vmprovision.image.chain import (
    Layer,
    forget_backing,
    make_overlay,
    run_qemu_img,
    source,
)
from vmprovision.image.diskfile import DiskFile, ImageReplacedError
from vmprovision.image.header import SECTOR
from vmprovision.image.seal import Record, append_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

OPEN = ".vmprovision-open"
SEALED = ".vmprovision-sealed"
MERGING = ".vmprovision-merging"
MERGE_SECONDS = 3600.0


class RedoLog:
    """One file of writes beside an image, held open from its making to the end of the merge.

    Attributes:
        file: the redo log itself.
        record: what it is for, where it was found sealed and authentic.
    """

    def __init__(
        self, folder: int, name: str, file: DiskFile, record: Record | None = None
    ) -> None:
        """Take the open folder, and the open file that has this name in it."""
        self.file = file
        self.record = record
        self.is_complete = False  # then it stays until it is merged, whatever happens
        self._begun = file.size
        self._folder = folder
        self._name = name

    def over(self, base: Layer) -> Layer:
        """Return the redo log as a disk, with the image below it."""
        return Layer(file=self.file, format="qcow2", backing=base)

    def begin(self) -> None:
        """Note the size while nothing has been written."""
        self._begun = self.file.size

    def seal(
        self,
        base: Layer,
        *,
        outside: bool,
        group: str = "",
        leader: DiskFile | None = None,
        followers: Sequence[DiskFile] = (),
    ) -> None:
        """Let the complete redo log say which image it is for, durably.

        Args:
            base: the image.
            outside: whether its references may lead out of its folder.
            group: as the record has it, and so are the others.
            leader: the image whose redo log is sealed after this one.
            followers: the images whose redo logs were sealed before this one.

        Raises:
            ImageReplacedError: the image or the redo log is not at its path any more.
            OSError: the host cannot write it.
        """
        forget_backing(self.file)
        status = os.fstat(base.file.handle)
        self.record = record = Record(
            format=base.format,
            size=status.st_size,
            mtime=status.st_mtime_ns,
            inode=status.st_ino,
            outside=outside,
            group=group,
            leader=str(leader.path) if leader else "",
            leader_inode=leader.identity[1] if leader else 0,
            followers=tuple((str(file.path), file.identity[1]) for file in followers),
        )
        append_record(self.file, record)
        os.fsync(self.file.handle)
        base.file.require_in_place()
        self._rename(f"{base.file.path.name}{SEALED}-{record.size}-{record.mtime}")

    def merge(self, base: Layer) -> None:
        """Write all of it into the image; what was interrupted before is completed.

        Raises:
            ImageReplacedError: the image is not at its path any more: before the merge,
                and nothing was written, or during it, and it is complete elsewhere.
            ImageRecoveryError: the merge broke off; it can be repeated.
            OSError: the host cannot write.
        """
        base.file.require_in_place()
        self._rename(base.file.path.name + MERGING)
        over = self.over(base)
        try:
            run_qemu_img(["commit", "-q", "-d", source(over)], [over], timeout=MERGE_SECONDS)
        except CommandError as exc:
            raise ImageRecoveryError(
                f"merging the redo log into {base.file} was interrupted: {exc.message}",
                hint=f"remove the cause, then run `vmprovision recover {base.file}`; "
                "until then the image must not be used",
            ) from exc
        if base.format == "raw" and self.record is not None:
            _cut_off_padding(base.file, self.record.size)
        self.discard()
        os.fsync(self._folder)
        try:
            base.file.require_in_place()
        except ImageReplacedError as exc:
            raise ImageReplacedError(
                f"{base.file} was moved or replaced while the redo log was merged into it: "
                "the moved file is finished, and the one that is at its path now was not touched",
                hint="look for the moved file",
            ) from exc

    def discard(self) -> None:
        """Remove the redo log; another file that has taken its name is left alone."""
        with contextlib.suppress(FileNotFoundError):
            if self._is_in_place():
                os.unlink(self._name, dir_fd=self._folder)

    @property
    def is_written(self) -> bool:
        """Whether anything was written to it since it was made: the first write makes it grow."""
        return self.file.size > self._begun

    @property
    def is_merging(self) -> bool:
        """Whether the image may be half written."""
        return self._name.endswith(MERGING)

    def _rename(self, name: str) -> None:
        if name != self._name:
            os.rename(self._name, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._name = name
        if not self._is_in_place():
            raise ImageReplacedError(
                f"the redo log {self.file} was replaced by another file",
                hint="run the command again, and keep others from the image's folder meanwhile",
            )
        os.fsync(self._folder)

    def _is_in_place(self) -> bool:
        try:
            status = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self.file.identity


@contextlib.contextmanager
def create_redo_log(beside: Path, base: Layer) -> Iterator[RedoLog]:
    """Make an empty redo log for an image; it is removed at the end, unless it is being merged.

    Whoever calls holds the image's lock, so a redo log that is there is nobody's.

    Args:
        beside: what it is named after, in whose folder it is made: the image, or
            the new image that is made of it.
        base: the image.

    Raises:
        ImageLockedError: another run makes the same new image.
        ImageError: it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        folder = open_folder(stack, beside)
        name = beside.name + OPEN
        handle = _make_file(stack, folder, beside, name)
        redo_log = RedoLog(folder, name, DiskFile(path=beside.with_name(name), handle=handle))
        try:
            make_overlay(redo_log.file, base)
            redo_log.begin()
            yield redo_log
        finally:
            if not (redo_log.is_merging or redo_log.is_complete):
                with contextlib.suppress(OSError):  # the next run throws it away
                    redo_log.discard()


def _cut_off_padding(file: DiskFile, size: int) -> None:
    """Give a raw disk its size back, whose last sector was a part of one: QEMU fills it up."""
    added = file.read(SECTOR, size)
    if added and file.size - size < SECTOR and not any(added):
        os.ftruncate(file.handle, size)
        os.fsync(file.handle)


def open_folder(stack: contextlib.ExitStack, beside: Path) -> int:
    """Open the directory that holds this file; return its descriptor, closed with the stack."""
    folder = os.open(beside.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, folder)
    return folder


def _make_file(stack: contextlib.ExitStack, folder: int, beside: Path, name: str) -> int:
    """Make the redo log's file and hold it.

    Raises:
        ImageLockedError: another run holds it.
        ImageError: it belongs to somebody else.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            handle = os.open(name, flags, 0o600, dir_fd=folder)
        except OSError as exc:
            if exc.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                raise
            raise _in_the_way(beside, name) from exc
        stack.callback(os.close, handle)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink > 1:
            raise _in_the_way(beside, name)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ImageLockedError(
                f"{beside} is being written by another run", hint="wait until that has ended"
            ) from exc
        except OSError as exc:
            if exc.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        with contextlib.suppress(FileNotFoundError):  # the one who held it has removed it
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                os.fchmod(handle, 0o600)
                os.ftruncate(handle, 0)
                return handle


def _in_the_way(beside: Path, name: str) -> ImageError:
    return ImageError(
        f"{beside.with_name(name)} is in the way of the redo log of {beside}",
        hint="delete it, if you do not know where it comes from",
    )
