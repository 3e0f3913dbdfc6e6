"""Open a disk image so that a change is either complete or leaves it untouched.

The image is locked, checked, and written to through a redo log (``redolog.py``).
``commit`` merges the redo log, or writes a new image from both (``newimage.py``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.errors import ImageRecoveryError
from vmprovision.image.chain import Layer, make_overlay, open_chain
from vmprovision.image.check import check_image
from vmprovision.image.diskfile import DiskFile, open_disk_file
from vmprovision.image.header import FORMATS, determine_format, named_format
from vmprovision.image.hostkey import host_key
from vmprovision.image.leftover import find_redo_log, is_decided
from vmprovision.image.newimage import write_new_image
from vmprovision.image.preconditions import (
    existing_image,
    host_failures,
    require_absent,
    require_room,
    require_short_name,
    require_writable,
)
from vmprovision.image.recovery import recover
from vmprovision.image.redolog import RedoLog, create_redo_log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vmprovision.progress import Control

log = logging.getLogger(__name__)

# An injection writes less than 8 MiB, and the filesystem adds its journal and metadata.
ROOM_NEEDED = 64 << 20
MERGE_MARGIN = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenImage:
    """A locked image, with the disk that an appliance works on.

    Attributes:
        path: the image, links resolved.
        base: the image with all files that it refers to.
        layer: the disk to give to the appliance: the redo log over the image, or the
            image itself to read.
        redo_log: the redo log, if the image is to be written to.
        outside: whether its references may lead out of its folder.
        new: the new image that ``commit`` writes instead, or None.
    """

    path: Path
    base: Layer
    layer: Layer
    outside: bool = False
    redo_log: RedoLog | None = None
    new: Path | None = None

    def commit(self, control: Control) -> None:
        """Merge the redo log into the image, or write the new image.

        Raises:
            ImageSpaceError: the host has too little free space; the image is unchanged.
            ImageReplacedError: another file has taken the image's path.
            ImageRecoveryError: merging was interrupted; ``recover`` completes it.
        """
        if self.new is not None:
            control.step("writing the new image")
            named = named_format(self.new)
            disk_format = named if named in FORMATS else self.base.format
            write_new_image(self.layer, self.base.file, self.new, disk_format)
        elif self.redo_log is not None:
            control.step("merging the redo log")
            with host_failures(self.path):
                require_room_to_merge(self)
                self.seal()
                self.merge()

    def seal(
        self, *, group: str = "", leader: DiskFile | None = None, followers: Sequence[DiskFile] = ()
    ) -> None:
        """Seal the redo log, as ``RedoLog.seal`` does."""
        if self.redo_log is not None:
            self.redo_log.seal(
                self.base, outside=self.outside, group=group, leader=leader, followers=followers
            )

    def merge(self) -> None:
        """Merge the sealed redo log, as ``RedoLog.merge`` does."""
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
    """Check and lock an image, and put a redo log over it if it is to be written to.

    An interrupted run is recovered first.  Leaving
    the block without ``commit`` leaves the image as it was, to the byte.

    Args:
        path: the image.
        stated_format: the disk format, if the caller states it.
        write: make a redo log; without it the image is read only.
        control: progress and cancellation.
        output: keep the image and write this new one at ``commit``.
        allow_outside: follow backing and data files out of the image's folder.
        repair: let QEMU repair, in place, an image that its machine has not closed.

    Raises:
        ImageError: the image cannot be used; the subclass says why, the message names it.
    """
    control.step("checking the image")
    image = existing_image(path)
    in_place = write and output is None
    if in_place:
        require_writable(image)
    if output is not None:
        require_absent(output)
    if write:
        require_short_name(output or image)
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


def require_room_to_merge(image: OpenImage) -> None:
    """Raise an error if the host has too little free space for a merge.

    Raises:
        ImageSpaceError: it has too little; the image is unchanged.
    """
    written = os.fstat(image.layer.file.handle).st_blocks * 512
    require_room(image.path, written + MERGE_MARGIN)


@contextlib.contextmanager
def create_throwaway(disk: Path, image: OpenImage) -> Iterator[Layer]:
    """Make an overlay over an open image, for writes that are thrown away.

    Raises:
        ImageError: the overlay cannot be made.
    """
    with host_failures(image.path):
        handle = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        file = DiskFile(path=disk, handle=handle)
        make_overlay(file, image.layer)
        yield Layer(file=file, format="qcow2", backing=image.layer)
    finally:
        os.close(handle)


def _to_read(stack: contextlib.ExitStack, base: Layer) -> OpenImage:
    """Return the image to read, through the sealed redo log of an interrupted run if any."""
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
        host_key()  # a redo log cannot be sealed without the key
        recover(base.file, base.format)
    else:
        with find_redo_log(base.file, base.format) as pending:
            if pending is not None:
                raise _interrupted(base.file.path)
    check_image(base, write=output is None, repair=repair)
    beside = output.absolute() if output else base.file.path
    require_room(beside, ROOM_NEEDED)
    redo_log = stack.enter_context(create_redo_log(beside, base))
    if output is not None:
        require_absent(output)  # again, now that this run holds the lock
    return OpenImage(
        path=base.file.path,
        base=base,
        layer=redo_log.over(base),
        outside=outside,
        redo_log=redo_log,
        new=output.absolute() if output else None,
    )


def _interrupted(image: Path) -> ImageRecoveryError:
    return ImageRecoveryError(
        f"an injection into {image} was interrupted, and its redo log is still there",
        hint=f"run `vmprovision recover {image}` first",
    )
