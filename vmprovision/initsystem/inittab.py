"""Read ``/etc/inittab``: inittab(5), and BusyBox's dialect of it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.guest.shelltext import without_comments

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader

INITTAB = PurePosixPath("/etc/inittab")
OPENRC = ("/sbin/openrc", "/usr/sbin/openrc", "/usr/bin/openrc", "/sbin/rc")
_OPENRC_NAME = re.compile(r"\bopenrc\b|/sbin/rc\b")


def read_inittab(reader: GuestReader) -> str:
    """Return the lines of the inittab that are not comments; empty if there is no inittab."""
    lines = (read_text(reader, INITTAB) or "").splitlines()
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


def names_openrc(text: str) -> bool:
    """Return whether a line names OpenRC outside its comment."""
    return any(_OPENRC_NAME.search(line) for line in without_comments(text))


def starts_openrc(reader: GuestReader, inittab: str) -> bool:
    """Return whether an inittab names OpenRC, and OpenRC is installed.

    Alpine's minimal root filesystem has that inittab without OpenRC.
    """
    return names_openrc(inittab) and any(resolved_file(reader, path) for path in OPENRC)
