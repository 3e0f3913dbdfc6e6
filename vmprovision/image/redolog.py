"""The redo log: a file beside an image that receives all writes until they are merged.

It is a qcow2 overlay that names no other file. QEMU gets the image below it as an open
file each time the redo log is opened. Its own name states how far the work has come,
and a name changes atomically:

``IMAGE.vmprovision-open``
    is being written. A later run that finds it deletes it.
``IMAGE.vmprovision-sealed-SIZE-MTIME``
    is complete and verified. SIZE and MTIME are the image's when it was sealed. Merging
    has not begun. So if the image differs by now, another program has changed it, and
    the redo log no longer fits.
``IMAGE.vmprovision-merging``
    is being merged with ``qemu-img commit``, which can be repeated any number of times.
    The image is whole again once a merge has ended.

The redo logs of a guest on several images are sealed together. One of them, the leader,
is sealed last and merged last. When it gets its new name, all of them are complete. A
redo log that follows a leader counts only while the leader's is there.
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
    """A file of writes beside an image, held open from its creation to the end of the merge.

    Attributes:
        file: the redo log itself.
        record: its sealed record, if an existing one was found and is authentic.
    """

    def __init__(
        self, folder: int, name: str, file: DiskFile, record: Record | None = None
    ) -> None:
        """Keep the open folder, and the open file that has this name in it."""
        self.file = file
        self.record = record
        self.is_complete = False  # from then on it is kept until it is merged
        self._begun = file.size
        self._folder = folder
        self._name = name

    def over(self, base: Layer) -> Layer:
        """Return the redo log as a disk over the image."""
        return Layer(file=self.file, format="qcow2", backing=base)

    def begin(self) -> None:
        """Note the file's size before the first write."""
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
        """Mark the redo log as complete and record which image it is for, durably.

        Args:
            base: the image.
            outside: whether its references may lead out of its folder.
            group: what all redo logs that are sealed together share.
            leader: the image whose redo log is sealed after this one.
            followers: the images whose redo logs were sealed before this one.

        Raises:
            ImageReplacedError: the image or the redo log is no longer at its path.
            OSError: the host cannot write to the redo log.
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
        """Write the redo log into the image; complete an interrupted merge.

        Raises:
            ImageReplacedError: the image is no longer at its path. If that was found
                before the merge, nothing was written; if after, the image is complete
                at another path.
            ImageRecoveryError: the merge failed; it can be repeated.
            OSError: the host cannot write to the image.
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
                "do not use the image before",
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
        """Remove the redo log, unless another file has taken its name."""
        with contextlib.suppress(FileNotFoundError):
            if self._is_in_place():
                os.unlink(self._name, dir_fd=self._folder)

    @property
    def is_written(self) -> bool:
        """Whether anything was written to the redo log; the first write makes it grow."""
        return self.file.size > self._begun

    @property
    def is_merging(self) -> bool:
        """Whether the image may be partly written."""
        return self._name.endswith(MERGING)

    def _rename(self, name: str) -> None:
        if name != self._name:
            os.rename(self._name, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._name = name
        if not self._is_in_place():
            raise ImageReplacedError(
                f"the redo log {self.file} was replaced by another file",
                hint="run the command again, and keep other programs out of the image's folder",
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
    """Make an empty redo log for an image; remove it at the end unless its merge has begun.

    The caller holds the image's lock, so no process uses a redo log that exists already.

    Args:
        beside: the file whose name and folder it uses: the image, or the new image
            that is made from it.
        base: the image.

    Raises:
        ImageLockedError: another run is making the same new image.
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
                with contextlib.suppress(OSError):  # the next run deletes it
                    redo_log.discard()


def _cut_off_padding(file: DiskFile, size: int) -> None:
    """Restore the size of a raw disk whose last sector is partial, which QEMU has padded."""
    added = file.read(SECTOR, size)
    if added and file.size - size < SECTOR and not any(added):
        os.ftruncate(file.handle, size)
        os.fsync(file.handle)


def open_folder(stack: contextlib.ExitStack, beside: Path) -> int:
    """Open the directory of this file; return its descriptor, which the stack closes."""
    folder = os.open(beside.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, folder)
    return folder


def _make_file(stack: contextlib.ExitStack, folder: int, beside: Path, name: str) -> int:
    """Create the redo log's file, and lock it.

    Raises:
        ImageLockedError: another run holds it.
        ImageError: it belongs to another user.
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
        with contextlib.suppress(FileNotFoundError):  # the run that held it has removed it
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                os.fchmod(handle, 0o600)
                os.ftruncate(handle, 0)
                return handle


def _in_the_way(beside: Path, name: str) -> ImageError:
    return ImageError(
        f"{beside.with_name(name)} exists, and the redo log of {beside} needs that name",
        hint="delete it if nothing of yours needs it",
    )
