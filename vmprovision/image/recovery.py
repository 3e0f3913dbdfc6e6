"""Complete or discard an interrupted change of an image."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmprovision.errors import ImageNotFoundError, ImageRecoveryError
from vmprovision.image.chain import Layer, open_chain
from vmprovision.image.check import has_leaks, repair_leaks
from vmprovision.image.diskfile import DiskFile, open_disk_file
from vmprovision.image.header import determine_format
from vmprovision.image.leftover import find_redo_log, is_decided, remove_unfinished
from vmprovision.image.preconditions import existing_image, host_failures, require_writable
from vmprovision.image.redolog import MERGING

if TYPE_CHECKING:
    from vmprovision.image.redolog import RedoLog
    from vmprovision.image.seal import Record
    from vmprovision.progress import Control

log = logging.getLogger(__name__)

Recovery = Literal["nothing", "discarded", "merged"]


def recover_image(
    path: Path, *, stated_format: str | None, control: Control, trust: bool = False
) -> Recovery:
    """Merge or discard the redo log of an interrupted injection; return which was done.

    Args:
        path: the image.
        stated_format: the disk format, if the caller states it.
        control: progress and cancellation.
        trust: merge a redo log that this user did not seal on this host.

    Raises:
        ImageRecoveryError: the image was changed since, so the redo log does not fit,
            or this user did not seal it on this host.
    """
    control.step("looking for a redo log")
    image = existing_image(path)
    require_writable(image)
    with host_failures(image), open_disk_file(image, write=True) as file:
        return recover(file, determine_format(file, stated_format), trust=trust)


def is_being_merged(path: Path) -> bool:
    """Return whether a merge of a redo log runs, or was interrupted."""
    image = path.resolve()
    return image.with_name(image.name + MERGING).exists()


def recover(image: DiskFile, disk_format: str, *, trust: bool = False) -> Recovery:
    """Complete or discard the redo log beside an image locked by this process.

    The lock proves that no other process is writing the redo log.

    Raises:
        ImageRecoveryError: it does not fit the image, or this user did not seal it on
            this host.
    """
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
    """Raise an error unless this image of a group may be recovered alone.

    Raises:
        ImageRecoveryError: the group's change is to be completed, or its outcome is
            unknown.
    """
    decided = is_decided(record)
    if decided is None:
        raise ImageRecoveryError(
            f"{image} was written together with {record.leader}, which is gone, so it is "
            "unknown whether that was complete",
            hint=f"restore {record.leader} with the redo log beside it",
        )
    if decided:
        raise ImageRecoveryError(
            f"{image} was written together with {record.leader}, and that was interrupted",
            hint=f"run `vmprovision recover {record.leader}`: it completes both",
        )


def _recover_follower(leader: DiskFile, path: Path, inode: int, group: str) -> None:
    """Merge the redo log of a leader's follower, unless that was done already.

    Raises:
        ImageRecoveryError: the image is not there, or was replaced.
    """
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(open_disk_file(path, write=True))
        except (OSError, ImageNotFoundError):
            image = None
        if image is None or image.identity[1] != inode:
            raise ImageRecoveryError(
                f"{path} was written together with {leader}, and is no longer at its path",
                hint=f"restore it, then run `vmprovision recover {leader}`",
            )
        pending = stack.enter_context(find_redo_log(image, None))
        if pending is not None and pending.record and pending.record.group == group:
            log.warning("%s: completing an interrupted injection", image)
            _complete(pending, image, pending.record.format)


def _repair_leaks(base: Layer) -> None:
    """Free the clusters that the interrupted merge had allocated and not yet used."""
    if base.format == "qcow2" and has_leaks(base):
        log.warning("%s: freeing clusters that the interrupted merge left unused", base.file)
        repair_leaks(base)
