"""The images of a guest on several disks: a change completes on all of them or on none.

Each image has a redo log. The redo logs that were written to are sealed together
(``redolog.py``). The first image's is sealed last; from then on all of them count.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

from vmprovision.errors import ImageError, ImageRecoveryError
from vmprovision.image.disk import open_image, require_room_to_merge
from vmprovision.image.preconditions import host_failures

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vmprovision.image.disk import OpenImage
    from vmprovision.progress import Control


@contextlib.contextmanager
def open_images(  # noqa: PLR0913 -- the caller's options, each of its own kind
    paths: Mapping[Path, str | None],
    *,
    write: bool,
    control: Control,
    output: Path | None = None,
    allow_outside: bool = False,
    repair: bool = False,
) -> Iterator[tuple[OpenImage, ...]]:
    """Open all images of one guest, each as ``open_image`` does.

    Args:
        paths: each image with its disk format, or None if the caller states none.
        write: make redo logs; without it the images are read only.
        control: progress and cancellation.
        output: keep the image and write this new one; only for a guest with one image.
        allow_outside: follow backing and data files out of an image's folder.
        repair: let QEMU repair, in place, an image that its machine has not closed.

    Raises:
        ImageError: an image cannot be used; the subclass says why, the message names it.
    """
    with contextlib.ExitStack() as stack:
        images: list[OpenImage] = []
        for path, stated_format in paths.items():
            _require_new(path, images)
            image = open_image(
                path,
                stated_format=stated_format,
                write=write,
                control=control,
                output=output,
                allow_outside=allow_outside,
                repair=repair,
            )
            images.append(stack.enter_context(image))
        yield tuple(images)


def _require_new(path: Path, images: Sequence[OpenImage]) -> None:
    with contextlib.suppress(OSError):  # open_image reports the fault
        status = path.stat()
        if (status.st_dev, status.st_ino) in [image.base.file.identity for image in images]:
            raise ImageError(f"{path} is given twice", hint="name each disk of the guest once")


def commit_images(images: Sequence[OpenImage], control: Control) -> None:
    """Merge the redo logs of one guest's images, all of them or none.

    An image that was not written to stays unchanged, and so does its modification time.

    Raises:
        ImageSpaceError: the host has too little free space; the images are unchanged.
        ImageReplacedError: another file is at an image's path; the images are
            unchanged.
        ImageRecoveryError: merging was interrupted; ``recover`` completes it.
    """
    written = [image for image in images if image.redo_log and image.redo_log.is_written]
    if len(images) == 1 or len(written) < 2:  # noqa: PLR2004 -- a single redo log needs no group
        (*written, images[0])[0].commit(control)
        return
    control.step("merging the redo logs")
    _seal(written)
    leader = written[0].path
    try:
        for image in (*written[1:], written[0]):
            with host_failures(image.path):
                image.merge()
    except ImageError as exc:
        raise ImageRecoveryError(
            f"merging the redo logs of {leader} and its other disks was interrupted: {exc.message}",
            hint=f"remove the cause, then run `vmprovision recover {leader}`; "
            "do not use any of the disks before",
        ) from exc


def _seal(written: Sequence[OpenImage]) -> None:
    """Seal the redo logs, the first image's last; a crash before that discards all of them."""
    leader, *followers = written
    group = secrets.token_hex(16)
    for image in written:
        require_room_to_merge(image)
    for image in followers:
        with host_failures(image.path):
            image.seal(group=group, leader=leader.base.file)
    try:
        with host_failures(leader.path):
            leader.seal(group=group, followers=[image.base.file for image in followers])
    except BaseException:
        if leader.redo_log is not None:
            leader.redo_log.discard()  # discarded before its followers
        raise
    for image in written:
        if image.redo_log is not None:
            image.redo_log.is_complete = True
