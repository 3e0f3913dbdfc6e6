"""Files that an init system leaves in a guest, even if another one runs the services.

A guest that was upgraded, or on which several init systems were tried, has programs and
services of more than one. Markers decide nothing. ``inspect --explain`` lists them, and
a refusal names them for the person who has to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import printable
from vmprovision.filesystem.protocol import resolved_file, status_of
from vmprovision.guest.facts import Hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.filesystem.protocol import GuestReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """Paths that an init system leaves behind.

    Attributes:
        programs: programs that could be process 1 or do its work, in every usual place.
        files: the files that it reads at boot.
        folders: directories that hold its services or the links that enable them.
    """

    programs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


def find_programs(reader: GuestReader, markers: Markers) -> list[PurePosixPath]:
    """Return the programs that exist, each real file once."""
    found: dict[PurePosixPath, PurePosixPath] = {}
    for path in markers.programs:
        real = resolved_file(reader, path)
        if real:
            found.setdefault(real, PurePosixPath(path))
    return list(found.values())


def find_markers(reader: GuestReader, system: str, markers: Markers) -> Iterator[Hint]:
    """Yield a hint, still without an outcome, for each marker of one init system that exists."""
    for path in find_programs(reader, markers):
        yield Hint(speaks_for=system, kind="program", seen=f"{path} is there")
    for name in markers.files:
        if status_of(reader, PurePosixPath(name)) is not None:
            yield Hint(speaks_for=system, kind="files", seen=f"{name} is there")
    for name in markers.folders:
        if count := _count_entries(reader, name):
            seen = f"{name} holds {count} {'entry' if count == 1 else 'entries'}"
            yield Hint(speaks_for=system, kind="files", seen=printable(seen))


def _count_entries(reader: GuestReader, name: str) -> int:
    names = reader.list_directory(PurePosixPath(name))
    return sum(not entry.startswith((".", "README")) for entry in names)
