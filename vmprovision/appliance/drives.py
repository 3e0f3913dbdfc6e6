"""A disk for an appliance, and the proof that the appliance's disk is that one."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.errors import ApplianceError

if TYPE_CHECKING:
    from pathlib import Path

SERIAL_LENGTH = 16


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
