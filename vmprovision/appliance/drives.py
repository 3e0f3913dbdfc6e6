"""A disk for an appliance, and the proof that the appliance's disk is that one."""

from __future__ import annotations

import errno
import os
import re
import secrets
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.errors import ApplianceError, ImageError, ImageSpaceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SERIAL_LENGTH = 16
# Without these, QEMU stops the machine where the host's disk is full, and waits for room.
TELL_FAILURES = {"werror": "report", "rerror": "report"}
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A disk for the appliance.

    Attributes:
        path: the file on the host.
        format: its format, always stated: a guessed format is a guest's choice.
        readonly: writes go to a throwaway snapshot.
    """

    path: Path
    format: str
    readonly: bool = False


class WrongDiskError(ApplianceError):
    """A disk of the appliance is not the image that it was given."""


def device_name(number: int) -> str:
    """What the appliance calls its disk of this number, counted from 0."""
    return f"/dev/sd{string.ascii_lowercase[number]}"


def new_serial() -> str:
    """A serial number that no other disk has; letters only, as libguestfs wants its labels."""
    return "".join(secrets.choice(string.ascii_letters) for _ in range(SERIAL_LENGTH))


def require_disk(drive: Drive, wanted: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Refuse a disk that is not the drive: by device name, serial number and size in bytes.

    Raises:
        WrongDiskError: one of them differs.
    """
    if found != wanted:
        raise WrongDiskError(
            f"the appliance's disk is not {drive.path}: device, serial number and size are "
            f"{found} and should be {wanted}",
            hint="nothing was written; the host may be overloaded: try again when it is less so",
        )


def raise_disk_failure(
    failures: Sequence[Mapping[str, Any]], files: Mapping[int, Path], cause: Exception | None = None
) -> None:
    """Raise what QEMU told of the host's disk, if it told anything.

    A guest's kernel writes long after it has said that it did, and does not tell a later
    ``umount`` of what failed; so nothing that was seen in the guest counts against this.

    Args:
        failures: the data of QEMU's events ``BLOCK_IO_ERROR``.
        files: the files of the disks, by the number that their names end with.
        cause: what failed in the guest.

    Raises:
        ImageSpaceError: there was no room for what was written.
        ImageError: a file could not be read or written.
    """
    for failure in failures:
        name = str(failure.get("node-name") or failure.get("device") or "")
        number = re.fullmatch(r"(?:disk|hd)(\d+)", name)
        file = files.get(int(number[1])) if number else None
        shown = str(file or "a temporary file of the appliance")
        reason = str(failure.get("reason", "unknown error"))
        if failure.get("nospace") or reason in FULL:
            raise ImageSpaceError(
                f"the host's disk is full: {shown} could not be written ({reason})",
                hint="the image is as it was; free some space and run the command again",
            ) from cause
        raise ImageError(
            f"the host could not {failure.get('operation', 'use')} {shown}: {reason}",
            hint="the image is as it was; `dmesg` may say what is wrong with the host's disk",
        ) from cause
