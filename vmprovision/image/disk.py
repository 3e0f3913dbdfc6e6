"""A disk image that is afterwards either finished or untouched.

It is locked, looked at, and written to through a redo log (``redolog.py``), which
is merged at the end; or a new image is made of both.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmprovision.errors import (
    CommandError,
    ImageError,
    ImageNotFoundError,
    ImageReadOnlyError,
    ImageRecoveryError,
    ImageSpaceError,
)
from vmprovision.image.chain import (
    Layer,
    make_overlay,
    open_chain,
    run_qemu_img,
    source,
)
from vmprovision.image.check import check_image, has_leaks, repair_leaks
from vmprovision.image.diskfile import DiskFile, name_of, open_disk_file
from vmprovision.image.header import FORMATS, determine_format, named_format
from vmprovision.image.hostkey import host_key
from vmprovision.image.redolog import (
    MERGE_SECONDS,
    MERGING,
    SEALED,
    Record,
    RedoLog,
    create_redo_log,
    find_redo_log,
    is_decided,
    remove_unfinished,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.progress import Control

log = logging.getLogger(__name__)

# What an injection writes is below 8 MiB; a filesystem's journal and metadata come to it.
ROOM_NEEDED = 64 << 20
MERGE_MARGIN = 4 << 20
NAME_LIMIT = 255  # NAME_MAX of every filesystem that holds disk images
PARTIAL = ".vmprovision-new"

Recovery = Literal["nothing", "discarded", "merged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenImage:
    """An image under its lock, with the disk that an appliance works on.

    Attributes:
        path: the image, links resolved.
        base: the image with all that it refers to.
        layer: what to give to the appliance: the redo log over the image, or the
            image to read.
        redo_log: where it is to be written.
        outside: whether its references may lead out of its folder.
        new: the image that ``commit`` writes instead, or None.
    """

    path: Path
    base: Layer
    layer: Layer
    outside: bool = False
    redo_log: RedoLog | None = None
    new: Path | None = None

    def commit(self, control: Control) -> None:
        """Merge the redo log into the image, or write the new image; atomic for the user.

        Raises:
            ImageSpaceError: the host has no room; the image is as it was.
            ImageReplacedError: another file has taken the image's path.
            ImageRecoveryError: merging was interrupted; ``recover`` completes it.
        """
        if self.new is not None:
            control.step("writing the new image")
            named = named_format(self.new)
            _write_new(self, self.new, named if named in FORMATS else self.base.format)
        elif self.redo_log is not None:
            control.step("merging the redo log")
            with host_failures(self.path):
                require_room_to_merge(self)
                self.seal()
                self.merge()

    def seal(
        self, *, group: str = "", leader: DiskFile | None = None, followers: Sequence[DiskFile] = ()
    ) -> None:
        """Seal the redo log, as ``RedoLog.seal``."""
        if self.redo_log is not None:
            self.redo_log.seal(
                self.base, outside=self.outside, group=group, leader=leader, followers=followers
            )

    def merge(self) -> None:
        """Merge the sealed redo log, as ``RedoLog.merge``."""
        if self.redo_log is not None:
            self.redo_log.merge(self.base)


@contextlib.contextmanager
def open_image(  # noqa: PLR0913 -- the caller's options, each of its own kind
    path: Path,
    *,
    stated_format: str | None,
    write: bool,
    control: Control,
    output: Path | None = None,
    allow_outside: bool = False,
    repair: bool = False,
) -> Iterator[OpenImage]:
    """Open an image: check it, lock it, and put a redo log over it if it is to be written.

    What an interrupted run left beside the image is dealt with first.  Leaving
    the block without ``commit`` leaves the image as it was, to the byte.

    Args:
        path: the image.
        stated_format: the disk format, where the caller says so.
        write: make a redo log; without it the image is read only.
        control: progress and cancellation.
        output: keep the image and write this new one at ``commit``.
        allow_outside: follow backing and data files out of the image's folder.
        repair: let QEMU repair an image that its machine has not closed, in place.

    Raises:
        ImageError: one of its kinds; the message names the image.
    """
    control.step("checking the image")
    image = _existing(path)
    in_place = write and output is None
    if in_place:
        _require_writable(image)
    if output is not None:
        _require_absent(output)
    if write:
        _require_short_name(output or image)
    with contextlib.ExitStack() as stack:
        with host_failures(image):
            file = stack.enter_context(open_disk_file(image, write=in_place))
            disk_format = determine_format(file, stated_format)
            base = stack.enter_context(
                open_chain(file, disk_format, allow_outside=allow_outside, write=in_place)
            )
            if write:
                opened = _to_write(stack, base, output, outside=allow_outside, repair=repair)
            else:
                opened = _to_read(stack, base)
        yield opened


@contextlib.contextmanager
def host_failures(image: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the host into the error that names the image."""
    try:
        yield
    except OSError as exc:
        kind = ImageSpaceError if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ImageError
        raise kind(
            f"{image} cannot be worked on: {exc.strerror} ({exc.filename or 'host'})",
            hint="remove the cause and run the command again",
        ) from exc


def require_room_to_merge(image: OpenImage) -> None:
    """Refuse to begin a merge for which the host has no room.

    Raises:
        ImageSpaceError: it has not; the image is as it was.
    """
    written = os.fstat(image.layer.file.handle).st_blocks * 512
    _require_room(image.path, written + MERGE_MARGIN)


@contextlib.contextmanager
def create_throwaway(disk: Path, image: OpenImage) -> Iterator[Layer]:
    """Make an overlay over an open image, to be written and thrown away.

    Raises:
        ImageError: it cannot be made.
    """
    with host_failures(image.path):
        handle = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        file = DiskFile(path=disk, handle=handle)
        make_overlay(file, image.layer)
        yield Layer(file=file, format="qcow2", backing=image.layer)
    finally:
        os.close(handle)


def recover_image(
    path: Path, *, stated_format: str | None, control: Control, trust: bool = False
) -> Recovery:
    """Return what became of an interrupted injection: its redo log merged, or thrown away.

    Args:
        path: the image.
        stated_format: the disk format, where the caller says so.
        control: progress and cancellation.
        trust: merge a redo log though this user has not sealed it on this host.

    Raises:
        ImageRecoveryError: the image was changed since, so the redo log does not fit,
            or it is none of ours.
    """
    control.step("looking for a redo log")
    image = _existing(path)
    _require_writable(image)
    with host_failures(image), open_disk_file(image, write=True) as file:
        return _recover(file, determine_format(file, stated_format), trust=trust)


def is_being_merged(path: Path) -> bool:
    """Return whether a redo log is being merged, or was when an injection was interrupted."""
    image = path.resolve()
    return image.with_name(image.name + MERGING).exists()


def _existing(path: Path) -> Path:
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


def _require_writable(image: Path) -> None:
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    if not image.stat().st_mode & writable:  # root could write it, and was told not to
        raise ImageReadOnlyError(
            f"{image} is read-only",
            hint="make it writable with chmod u+w, or write a new image with --output",
        )
    if not os.access(image.parent, os.W_OK):
        raise ImageReadOnlyError(
            f"the redo log of {image} cannot be written beside it: {image.parent} is not writable",
            hint="move the image, or write a new one elsewhere with --output",
        )


def _require_absent(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise ImageError(f"{output} is there already", hint="choose another --output")
    if not os.access(output.absolute().parent, os.W_OK):
        raise ImageReadOnlyError(f"{output} cannot be created in its directory")


def _require_short_name(image: Path) -> None:
    """Refuse a name to which the longest of the redo log's suffixes cannot be added."""
    longest = f"{SEALED}-{1 << 63}-{1 << 63}"
    if len(os.fsencode(image.name)) + len(longest) > NAME_LIMIT:
        raise ImageError(
            f"the name of {image} is too long for a redo log beside it",
            hint=f"give it a name of at most {NAME_LIMIT - len(longest)} bytes",
        )


def _to_read(stack: contextlib.ExitStack, base: Layer) -> OpenImage:
    """Return the image to read, through the finished redo log of an interrupted run if any."""
    image = base.file.path
    pending = stack.enter_context(find_redo_log(base.file, base.format))
    record = pending.record if pending else None
    if record and record.leader and is_decided(record) is False:
        pending = None
    if pending is None:
        check_image(base)
        return OpenImage(path=image, base=base, layer=base)
    log.warning("%s: reading through the redo log of an interrupted run", image)
    return OpenImage(path=image, base=base, layer=pending.over(base))


def _to_write(
    stack: contextlib.ExitStack, base: Layer, output: Path | None, *, outside: bool, repair: bool
) -> OpenImage:
    """Return the image behind a new redo log, after recovering an interrupted run."""
    if output is None:
        host_key()  # without it nothing can be sealed
        _recover(base.file, base.format)
    else:
        with find_redo_log(base.file, base.format) as pending:
            if pending is not None:
                raise _interrupted(base.file.path)
    check_image(base, write=output is None, repair=repair)
    beside = output.absolute() if output else base.file.path
    _require_room(beside, ROOM_NEEDED)
    redo_log = stack.enter_context(create_redo_log(beside, base))
    if output is not None:
        _require_absent(output)  # now that nobody else makes it
    return OpenImage(
        path=base.file.path,
        base=base,
        layer=redo_log.over(base),
        outside=outside,
        redo_log=redo_log,
        new=output.absolute() if output else None,
    )


def _recover(image: DiskFile, disk_format: str, *, trust: bool = False) -> Recovery:
    # we hold the image's lock, so nobody is writing it any more
    outcome: Recovery = "discarded" if remove_unfinished(image.path) else "nothing"
    with find_redo_log(image, disk_format, trust=trust) as pending:
        if pending is None:
            return outcome
        if not trust and pending.record and pending.record.leader:
            _require_undecided(image, pending.record)
            pending.discard()
            return "discarded"
        log.warning("%s: completing an interrupted injection", image)
        if pending.record:
            for path, inode in pending.record.followers:
                _recover_follower(image, Path(path), inode, pending.record.group)
        _complete(pending, image, disk_format)
    return "merged"


def _complete(pending: RedoLog, image: DiskFile, disk_format: str) -> None:
    """Merge a redo log that an interrupted run left."""
    outside = pending.record is not None and pending.record.outside
    with open_chain(image, disk_format, allow_outside=outside, write=True) as base:
        was_merging = pending.is_merging
        pending.merge(base)
        if was_merging:
            _repair_leaks(base)


def _require_undecided(image: DiskFile, record: Record) -> None:
    """Refuse to touch one of several images that were written together, but for throwing away.

    Raises:
        ImageRecoveryError: its redo log is to be merged, or nobody can tell.
    """
    decided = is_decided(record)
    if decided is None:
        raise ImageRecoveryError(
            f"{image} was written together with {record.leader}, which is not there any more, "
            "so nobody can tell whether that was finished",
            hint=f"bring {record.leader} back with the redo log beside it",
        )
    if decided:
        raise ImageRecoveryError(
            f"{image} was written together with {record.leader}, and that was interrupted",
            hint=f"run `vmprovision recover {record.leader}`: it completes both",
        )


def _recover_follower(leader: DiskFile, path: Path, inode: int, group: str) -> None:
    """Merge what belongs to a leader's redo log, if it is not merged already.

    Raises:
        ImageRecoveryError: the image is not there, or is another one.
    """
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(open_disk_file(path, write=True))
        except (OSError, ImageNotFoundError):
            image = None
        if image is None or image.identity[1] != inode:
            raise ImageRecoveryError(
                f"{path} was written together with {leader}, and is not at its path any more",
                hint=f"bring it back, then run `vmprovision recover {leader}`",
            )
        pending = stack.enter_context(find_redo_log(image, None))
        if pending is not None and pending.record and pending.record.group == group:
            log.warning("%s: completing an interrupted injection", image)
            _complete(pending, image, pending.record.format)


def _repair_leaks(base: Layer) -> None:
    """Give back the clusters that the interrupted merge had allocated and not yet used."""
    if base.format == "qcow2" and has_leaks(base):
        log.warning("%s: giving back clusters that the interrupted merge had lost", base.file)
        repair_leaks(base)


def _interrupted(image: Path) -> ImageRecoveryError:
    return ImageRecoveryError(
        f"{image} has the redo log of an interrupted injection beside it",
        hint=f"run `vmprovision recover {image}` first",
    )


def _write_new(image: OpenImage, new: Path, disk_format: str) -> None:
    """Write the image with its redo log to a new file, which is nobody else's until it is whole."""
    folder = new.with_name(new.name + PARTIAL)
    try:
        with _private_folder(folder) as handle:
            partial = Path(name_of(handle)) / new.name
            run_qemu_img(
                ["convert", "-O", disk_format, source(image.layer), str(partial)],
                [image.layer],
                timeout=MERGE_SECONDS,
                keep=[handle],
            )
            written = os.open(partial, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # most have none
                    os.removexattr(written, "system.posix_acl_access")
                os.fchmod(written, _mode_like(image.base.file, written))
                os.fsync(written)
            finally:
                os.close(written)
            _put_in_place(partial, new)
        _sync_directory(new.parent)
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
    """Hold open a new folder for this user alone; what a killed run left of it is removed first."""
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
    """Return a mode that lets nobody read the new image who cannot read the old one."""
    was, now = os.fstat(old.handle), os.fstat(new)
    mode = was.st_mode
    if was.st_gid != now.st_gid:  # to its group, the new image's one is like all others
        mode &= ~0o070 | (mode & 0o007) << 3
    return mode & now.st_mode & 0o666 | 0o600


def _put_in_place(partial: Path, new: Path) -> None:
    """Give the finished file its name; a file that came there meanwhile is not replaced."""
    try:
        os.link(partial, new)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _require_absent(new)  # a filesystem without hard links
        partial.rename(new)


def _require_room(beside: Path, needed: int) -> None:
    free = shutil.disk_usage(beside.absolute().parent).free
    if free < needed:
        raise ImageSpaceError(
            f"{beside.absolute().parent} has {free >> 20} MiB free, "
            f"the redo log of {beside.name} needs {needed >> 20}",
            hint="free some space, or write a new image elsewhere with --output",
        )


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
