r"""fstab(5), as getmntent(3) and libmount read it.

Fields are separated by blanks and tabs, and hold ``\040`` for a blank.  The file is
hostile input, so it is read in linear time, and one that is larger than any real fstab
is refused.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import read_all, resolved_file
from vmprovision.mounts.guestmount import GuestMount

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader

FSTAB = PurePosixPath("/etc/fstab")
FSTAB_LIMIT = 4 << 20
MOUNTS_LIMIT = 100_000
FIELD_LIMIT = 4096  # PATH_MAX of limits.h
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


class FstabLine(NamedTuple):
    """A line of fstab that mounts something on a directory; a tuple, because there may be many.

    Attributes:
        options: separated by commas.
    """

    source: str
    mountpoint: str
    kind: str
    options: str
    number: int

    def as_mount(self) -> GuestMount:
        """Return it as a mount of the guest whose real place is not known yet."""
        path = PurePosixPath(self.mountpoint)
        return GuestMount(
            source=self.source,
            mountpoint=path,
            place=path,
            kind=self.kind,
            options=tuple(self.options.split(",")),
            origin=f"line {self.number} of {FSTAB}",
        )


def read_fstab(reader: GuestReader) -> list[FstabLine]:
    """Return what the guest's fstab mounts on directories, in its order, each mount once.

    Raises:
        InspectionError: it is too large, or has too many mounts.
    """
    path = resolved_file(reader, str(FSTAB))
    if path is None:
        return []
    found: dict[tuple[str, ...], FstabLine] = {}
    for number, line in enumerate(read_all(reader, path, FSTAB_LIMIT).split(b"\n"), 1):
        fields = _fields(line)
        if fields:
            found.setdefault(fields, FstabLine(*fields, number))
    if len(found) > MOUNTS_LIMIT:
        raise InspectionError(
            f"guest file {FSTAB} has more than {MOUNTS_LIMIT} mounts",
            hint="remove the lines that are not needed",
        )
    return list(found.values())


def _fields(line: bytes) -> tuple[str, str, str, str] | None:
    """Return source, mountpoint, type and options, or None for comments, swap and invalid lines."""
    # mount(8) reads C strings: a NUL ends them; bytes.split() splits at ASCII blanks only
    fields = line.partition(b"\0")[0].split(None, 4)
    if len(fields) < 2 or fields[0].startswith(b"#") or not fields[1].startswith(b"/"):  # noqa: PLR2004 -- source and mountpoint
        return None
    defaults = (b"auto", b"defaults")[len(fields) - 2 :]
    source, mountpoint, kind, options = [_decoded(each) for each in (*fields, *defaults)[:4]]
    return (source, mountpoint, kind, options) if len(line) <= 4 * FIELD_LIMIT else None


def _decoded(field: bytes) -> str:
    if b"\\" in field:
        field = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)
    return field.partition(b"\0")[0].decode("utf-8", errors="replace")
