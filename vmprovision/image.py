"""A disk image that is afterwards either finished or untouched: the redo log.

All writes go to a qcow2 overlay beside the image.  Its name says where the work
stands, and a name changes atomically:

``IMAGE.vmprovision-open``
    being written; whoever finds it later throws it away.
``IMAGE.vmprovision-sealed-SIZE-MTIME``
    complete and verified; the image was so large and so old when it was sealed.
    Merging has not begun, so an image that differs by now was changed by somebody
    else, and the redo log no longer fits it.
``IMAGE.vmprovision-merging``
    being merged with ``qemu-img commit``, which may be repeated any number of
    times; the image is whole again when that has ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vmprovision.command import run
from vmprovision.diskformat import (
    FORMATS,
    check_image,
    check_references,
    determine_format,
    named_format,
    qcow2_references,
)
from vmprovision.errors import (
    CommandError,
    ImageError,
    ImageNotFoundError,
    ImageReadOnlyError,
    ImageRecoveryError,
    ImageSpaceError,
)
from vmprovision.imagelock import image_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmprovision.progress import Control

log = logging.getLogger(__name__)

OPEN = ".vmprovision-open"
SEALED = ".vmprovision-sealed"
MERGING = ".vmprovision-merging"
# What an injection writes is below 8 MiB; a filesystem's journal and metadata come to it.
ROOM_NEEDED = 64 << 20
MERGE_MARGIN = 4 << 20
MERGE_SECONDS = 3600.0
NAME_LIMIT = 255  # NAME_MAX of every filesystem that holds disk images

Recovery = Literal["nothing", "discarded", "merged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenImage:
    """An image under its lock, with the file that an appliance works on.

    Attributes:
        path: the image, links resolved.
        format: its disk format.
        drive: what to give to the appliance: the redo log, or the image to read.
        drive_format: the format of ``drive``.
        lock: the open file that bears the image's lock.
        new: the image that ``commit`` writes instead, or None.
    """

    path: Path
    format: str
    drive: Path
    drive_format: str
    lock: int
    new: Path | None = None

    def commit(self, control: Control) -> None:
        """Merge the redo log into the image, or write the new image; atomic for the user.

        Raises:
            ImageSpaceError: the host has no room; the image is as it was.
            ImageRecoveryError: merging was interrupted; ``recover`` completes it.
        """
        if self.new is not None:
            control.step("writing the new image")
            named = named_format(self.new)
            _write_new(self.drive, self.new, named if named in FORMATS else self.format)
            return
        control.step("merging the redo log")
        with _host_failures(self.path):
            _require_room(self.path, self.drive.stat().st_blocks * 512 + MERGE_MARGIN)
            _merge(_seal(self.path, self.drive), self.path, self.format, self.lock)


@contextlib.contextmanager
def open_image(  # noqa: PLR0913 -- the caller's options, each of its own kind
    path: Path,
    *,
    stated_format: str | None,
    write: bool,
    control: Control,
    output: Path | None = None,
    allow_outside: bool = False,
) -> Iterator[OpenImage]:
    """The image, checked, locked, and behind a redo log where it is to be written.

    What an interrupted run left beside the image is dealt with first.  Leaving
    the block without ``commit`` leaves the image as it was, to the byte.

    Args:
        path: the image.
        stated_format: the disk format, where the caller says so.
        write: make a redo log; without it the image is read only.
        control: progress and cancellation.
        output: keep the image and write this new one at ``commit``.
        allow_outside: follow backing and data files out of the image's folder.

    Raises:
        ImageError: one of its kinds; the message names the image.
    """
    control.step("checking the image")
    image = _existing(path)
    if write and output is None:
        _require_writable(image)
    if output is not None:
        _require_absent(output)
    if write:
        _require_short_name(output or image)
    with contextlib.ExitStack() as locks:
        with _host_failures(image):
            lock = locks.enter_context(image_lock(image, write=write and output is None))
            disk_format = determine_format(image, stated_format)
            for backing in check_references(image, disk_format, allow_outside=allow_outside):
                locks.enter_context(image_lock(backing, write=False))
            if write:
                opened = _to_write(image, disk_format, output, lock)
            else:
                opened = _to_read(image, disk_format, lock)
        try:
            yield opened
        finally:
            if write:
                with contextlib.suppress(OSError):  # the next run throws it away
                    opened.drive.unlink()


@contextlib.contextmanager
def _host_failures(image: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the host into the error that names the image."""
    try:
        yield
    except OSError as exc:
        kind = ImageSpaceError if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ImageError
        raise kind(
            f"{image} cannot be worked on: {exc.strerror} ({exc.filename or 'host'})",
            hint="mend the cause and run the command again",
        ) from exc


def create_throwaway(disk: Path, image: OpenImage) -> None:
    """Make an overlay over an open image, to be written and thrown away.

    Raises:
        ImageError: it cannot be made.
    """
    _create_overlay(disk, image.drive, image.drive_format)


def recover_image(path: Path, *, stated_format: str | None, control: Control) -> Recovery:
    """What became of an interrupted injection: its redo log merged, or thrown away.

    Raises:
        ImageRecoveryError: the image was changed since, so the redo log does not fit.
    """
    control.step("looking for a redo log")
    image = _existing(path)
    _require_writable(image)
    with image_lock(image, write=True) as lock, _host_failures(image):
        return _recover(image, determine_format(image, stated_format), lock)


def is_being_merged(path: Path) -> bool:
    """Whether a redo log of the image is being merged, or was when an injection was interrupted."""
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


def _to_read(image: Path, disk_format: str, lock: int) -> OpenImage:
    """The image to read: through the finished redo log of an interrupted run, if there is one."""
    pending = _pending(image)
    if pending is None:
        check_image(image, disk_format)
        return OpenImage(
            path=image, format=disk_format, drive=image, drive_format=disk_format, lock=lock
        )
    log.warning("%s: reading through the redo log of an interrupted run", image)
    return OpenImage(path=image, format=disk_format, drive=pending, drive_format="qcow2", lock=lock)


def _to_write(image: Path, disk_format: str, output: Path | None, lock: int) -> OpenImage:
    """The image behind a new redo log, what an interrupted run left dealt with."""
    if output is None:
        _recover(image, disk_format, lock)
    elif _pending(image):
        raise _interrupted(image)
    check_image(image, disk_format)
    beside = output.absolute() if output else image
    redo_log = beside.with_name(beside.name + OPEN)
    _create_overlay(redo_log, image, disk_format)
    return OpenImage(
        path=image, format=disk_format, drive=redo_log, drive_format="qcow2", lock=lock, new=output
    )


def _create_overlay(redo_log: Path, image: Path, disk_format: str) -> None:
    _require_room(redo_log, ROOM_NEEDED)
    redo_log.unlink(missing_ok=True)
    try:
        run(
            [
                *("qemu-img", "create", "-q", "-f", "qcow2", "-F", disk_format),
                *("-b", _unlocked(image, disk_format), redo_log),
            ],
            timeout=60,
        )
        redo_log.chmod(0o600)
    except CommandError as exc:
        redo_log.unlink(missing_ok=True)
        raise ImageError(f"no redo log can be made for {image}: {exc.message}") from exc


def _unlocked(image: Path, disk_format: str) -> str:
    """The image as QEMU is to open it: by this format, and not locked, since we hold the lock."""
    file = {"driver": "file", "filename": str(image), "locking": "off"}
    return _json_name({"driver": disk_format, "file": file})


def _json_name(described: dict[str, Any]) -> str:
    return "json:" + json.dumps(described, ensure_ascii=False)


def _seal(image: Path, redo_log: Path) -> Path:
    """Rename the complete redo log so that it says which image it is for, durably."""
    status = image.stat()
    sealed = image.with_name(f"{image.name}{SEALED}-{status.st_size}-{status.st_mtime_ns}")
    handle = os.open(redo_log, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    redo_log.rename(sealed)
    _sync_directory(image.parent)
    return sealed


def _merge(sealed: Path, image: Path, disk_format: str, lock: int) -> None:
    _require_same_format(sealed, image, disk_format)
    merging = image.with_name(image.name + MERGING)
    sealed.rename(merging)
    _sync_directory(image.parent)
    overlay = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(merging)},
        "backing": {
            "driver": disk_format,
            "file": {"driver": "file", "filename": str(image), "locking": "off"},
        },
    }
    try:
        run(
            ["qemu-img", "commit", "-q", "-d", _json_name(overlay)],
            timeout=MERGE_SECONDS,
            keep=[lock],  # should this process be killed, nobody else gets the image until it ends
        )
    except CommandError as exc:
        raise ImageRecoveryError(
            f"merging the redo log into {image} was interrupted: {exc.message}",
            hint=f"mend the cause, then run `vmprovision recover {image}`; "
            "until then the image must not be used",
        ) from exc
    merging.unlink()
    _sync_directory(image.parent)


def _require_same_format(redo_log: Path, image: Path, disk_format: str) -> None:
    """Refuse to merge as another format than the redo log was made for.

    A person may say ``--format raw`` of anything, and merging would then write
    over the image's own header.
    """
    backing = qcow2_references(redo_log).backing or ""
    made_for = json.loads(backing.removeprefix("json:") or "{}").get("driver")
    if made_for != disk_format:
        raise ImageRecoveryError(
            f"the redo log of {image} was made for a {made_for} image, not for {disk_format}",
            hint=f"state the true format: --format {made_for}",
        )


def _recover(image: Path, disk_format: str, lock: int) -> Recovery:
    outcome: Recovery = "nothing"
    leftover = image.with_name(image.name + OPEN)
    if leftover.exists():  # we hold the image's lock, so nobody is writing it any more
        log.warning("%s: throwing away the unfinished redo log of an interrupted run", image)
        leftover.unlink()
        outcome = "discarded"
    pending = _pending(image)
    if pending is None:
        return outcome
    log.warning("%s: completing an interrupted injection", image)
    _merge(pending, image, disk_format, lock)
    return "merged"


def _pending(image: Path) -> Path | None:
    """The complete redo log beside the image, if an interrupted run left one.

    Raises:
        ImageRecoveryError: there is one, for an image that has changed since.
    """
    merging = image.with_name(image.name + MERGING)
    if merging.is_symlink() or merging.exists():
        return _ours(merging, image)
    pattern = re.compile(re.escape(image.name + SEALED) + r"-(\d+)-(\d+)$")
    for entry in image.parent.iterdir():
        if match := pattern.match(entry.name):
            status = image.stat()
            if (int(match[1]), int(match[2])) != (status.st_size, status.st_mtime_ns):
                raise ImageRecoveryError(
                    f"{image} was changed after an injection was interrupted; "
                    f"the redo log {entry.name} no longer fits it",
                    hint=f"delete {entry} and inject again",
                )
            return _ours(entry, image)
    return None


def _ours(redo_log: Path, image: Path) -> Path:
    """The redo log, if it is a file of this user's or of the image's owner.

    In a directory that all may write to, anybody could lay one beside the image.
    """
    status = redo_log.lstat()
    owners = (os.geteuid(), image.stat().st_uid)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners:
        raise ImageRecoveryError(
            f"{redo_log} looks like a redo log of {image} and belongs to somebody else",
            hint="delete it, if you do not know where it comes from",
        )
    return redo_log


def _interrupted(image: Path) -> ImageRecoveryError:
    return ImageRecoveryError(
        f"{image} has the redo log of an interrupted injection beside it",
        hint=f"run `vmprovision recover {image}` first",
    )


def _write_new(redo_log: Path, new: Path, disk_format: str) -> None:
    partial = new.with_name(new.name + ".vmprovision-new")
    try:
        run(
            [
                *("qemu-img", "convert", "-U", "-f", "qcow2", "-O", disk_format),
                *(redo_log, partial.absolute()),
            ],
            timeout=MERGE_SECONDS,
        )
        handle = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        _put_in_place(partial, new)
        _sync_directory(new.absolute().parent)
    except (CommandError, OSError) as exc:
        cause = exc.message if isinstance(exc, CommandError) else exc.strerror
        raise ImageError(f"the new image {new} cannot be written: {cause}") from exc
    finally:
        partial.unlink(missing_ok=True)


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
