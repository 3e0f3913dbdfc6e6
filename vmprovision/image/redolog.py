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

Anybody may lay a file of such a name beside an image, an archive that was unpacked
for instance.  So sealing writes a record behind the qcow2: what the redo log is
for, and a code (HMAC, RFC 2104) of all that is before it under a key that only
this user of this host has.  The code and the record reach the disk before the new
name does.

A guest may lie on several images, whose redo logs are sealed together.  That of one
of them, the leader, is sealed last and merged last: its new name is the moment from
which all of them are complete, and a redo log that follows a leader counts as long
as the leader's is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import stat
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
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
from vmprovision.image.header import SECTOR, qcow2_references
from vmprovision.image.hostkey import host_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

OPEN = ".vmprovision-open"
SEALED = ".vmprovision-sealed"
MERGING = ".vmprovision-merging"
MERGE_SECONDS = 3600.0

_RECORD_MAGIC = b"vmprovision-redo"
_RECORD_END = struct.Struct(">32sI16s")  # the code, the record's length, the magic
_RECORD_LIMIT = 64 << 10
_READ_SIZE = 1 << 20
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a sealed redo log is for.

    Attributes:
        format: the image's disk format.
        size: the size of the image's file when it was sealed.
        mtime: its modification time then, in nanoseconds.
        inode: its inode.
        outside: whether the caller allowed references out of the image's folder.
        group: what the redo logs that were sealed together have in common.
        leader: the image whose redo log decides about this one; empty for the leader's own.
        leader_inode: its inode.
        followers: the images whose redo logs are merged before this one: path and inode.
    """

    format: str
    size: int
    mtime: int
    inode: int
    outside: bool
    group: str = ""
    leader: str = ""
    leader_inode: int = 0
    followers: tuple[tuple[str, int], ...] = ()


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
        _append_record(self.file, record)
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
        folder = _open_folder(stack, beside)
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


def _open_folder(stack: contextlib.ExitStack, beside: Path) -> int:
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


def remove_unfinished(image: Path) -> bool:
    """Throw away an unfinished redo log of an image whose lock we hold; whether there was one."""
    leftover = image.with_name(image.name + OPEN)
    if not (leftover.is_symlink() or leftover.exists()):
        return False
    log.warning("%s: throwing away the unfinished redo log of an interrupted run", image)
    leftover.unlink()
    return True


@contextlib.contextmanager
def find_redo_log(
    image: DiskFile, disk_format: str | None, *, trust: bool = False
) -> Iterator[RedoLog | None]:
    """Hold the complete redo log that an interrupted run left beside an image, if there is one.

    Args:
        image: the image, whose lock we hold.
        disk_format: its format; None: what the redo log was made for.
        trust: the caller knows that it is one, though this host cannot know.

    Raises:
        ImageRecoveryError: there is one, for an image that has changed since or for
            another one, or it is none that this user has made on this host.
    """
    with contextlib.ExitStack() as stack:
        folder = _open_folder(stack, image.path)
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
        record = _read_record(file, trust=trust)
        if record is None and not trust:
            raise _foreign(path, image, "was not sealed by this user on this host")
        redo_log = RedoLog(folder, name, file, record)
        if record is not None:
            _require_fitting(redo_log, record, image, disk_format, trust=trust)
        yield redo_log


def _complete_name(folder: int, image: Path) -> str | None:
    """Return the name of the image's complete redo log in its open folder, if there is one."""
    pattern = re.compile(re.escape(image.name + SEALED) + r"-\d+-\d+$")
    merging = image.name + MERGING
    names = os.listdir(folder)
    found = [name for name in names if name == merging or pattern.match(name)]
    return None if not found else merging if merging in found else min(found)


def is_decided(record: Record) -> bool | None:
    """Return whether the redo log that this one follows was sealed; None where nothing tells.

    The leader's is merged after all that follow it, so without it nothing was decided.
    """
    leader = Path(record.leader)
    with contextlib.ExitStack() as stack:
        try:
            folder = _open_folder(stack, leader)
            inode = os.stat(leader.name, dir_fd=folder, follow_symlinks=False).st_ino
            name = _complete_name(folder, leader)
            if inode != record.leader_inode or name is None:
                return False if inode == record.leader_inode else None
            handle = os.open(name, _LOOK, dir_fd=folder)
        except OSError:
            return None
        stack.callback(os.close, handle)
        found = _read_record(DiskFile(path=leader.with_name(name), handle=handle), trust=False)
    return None if found is None else found.group == record.group


def _require_ours(file: DiskFile, image: DiskFile, *, trust: bool) -> None:
    """Refuse a redo log that somebody else can have written, or that refers to another file."""
    status = os.fstat(file.handle)
    owners = (os.geteuid(), os.fstat(image.handle).st_uid)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners or status.st_mode & 0o022:
        raise _foreign(file.path, image, "is another user's, or others can write to it")
    try:
        references = qcow2_references(file)
    except ImageError as exc:
        raise _foreign(file.path, image, f"cannot be read: {exc.message}") from exc
    # earlier versions named the image; that name is not followed
    if references.data or (references.backing is not None and not trust):
        raise _foreign(file.path, image, "refers to another file, as none of ours does")


def _require_fitting(
    redo_log: RedoLog, record: Record, image: DiskFile, disk_format: str | None, *, trust: bool
) -> None:
    """Refuse an image, or a format, for which the redo log was not made.

    A person may say ``--format raw`` of anything, and merging would then write
    over the image's own header.
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
        f"{path} is no redo log that can be merged into {image}: it {cause}",
        hint="recover as the user and on the host that ran the injection; if you do not know "
        f"where the file comes from, delete it ({state}); if you know that it is a redo log of "
        f"this image, run `vmprovision recover --trust-redo-log {image}`",
    )


def _append_record(file: DiskFile, record: Record) -> None:
    """Write the record and its code behind the redo log's content."""
    size = file.size
    text = json.dumps(asdict(record)).encode()
    code = _code(file, size, text)
    os.pwrite(file.handle, text + _RECORD_END.pack(code, len(text), _RECORD_MAGIC), size)


def _read_record(file: DiskFile, *, trust: bool) -> Record | None:
    """Return the record of a sealed redo log; None where it has none that is authentic."""
    size = file.size
    end = file.read(_RECORD_END.size, max(0, size - _RECORD_END.size))
    try:
        code, length, magic = _RECORD_END.unpack(end)
    except struct.error:
        return None
    start = size - _RECORD_END.size - length
    if magic != _RECORD_MAGIC or length > _RECORD_LIMIT or start < 0:
        return None
    text = file.read(length, start)
    if not trust and not hmac.compare_digest(code, _code(file, start, text)):
        return None
    try:
        found = json.loads(text)
        followers = tuple((str(path), int(inode)) for path, inode in found.pop("followers", ()))
        return Record(**found, followers=followers)
    except (ValueError, TypeError):  # of another version, or trusted and damaged
        return None


def _code(file: DiskFile, size: int, text: bytes) -> bytes:
    """Return the code of the first bytes of a file and of the record behind them."""
    code = hmac.new(host_key(), digestmod=hashlib.sha256)
    for offset in range(0, size, _READ_SIZE):
        code.update(file.read(min(_READ_SIZE, size - offset), offset))
    code.update(text)
    return code.digest()
