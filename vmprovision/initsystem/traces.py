"""What init systems leave in a guest besides deciding anything: ``inspect --explain`` shows it.

A guest that was upgraded, or in which several init systems were tried, holds
programs and services of more than one.  None of it says which is process 1; it
says which others there might have been.
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
class Traces:
    """Where an init system leaves something of itself.

    Attributes:
        programs: what could be process 1, or does its work, at each place where it may stand.
        files: what it reads at boot.
        folders: where its services or what enables them stand.
    """

    programs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


def present_programs(reader: GuestReader, traces: Traces) -> list[PurePosixPath]:
    """The programs that are there, each once however many links lead to it."""
    found: dict[PurePosixPath, PurePosixPath] = {}
    for path in traces.programs:
        real = resolved_file(reader, path)
        if real:
            found.setdefault(real, PurePosixPath(path))
    return list(found.values())


def find_traces(reader: GuestReader, system: str, traces: Traces) -> Iterator[Hint]:
    """What there is of one init system, as hints that have not been weighed yet."""
    for path in present_programs(reader, traces):
        yield Hint(speaks_for=system, kind="program", seen=f"{path} is there")
    for name in traces.files:
        if _is_there(reader, name):
            yield Hint(speaks_for=system, kind="files", seen=f"{name} is there")
    for name in traces.folders:
        if count := _entries(reader, name):
            seen = f"{name} holds {count} {'entry' if count == 1 else 'entries'}"
            yield Hint(speaks_for=system, kind="files", seen=printable(seen))


def _is_there(reader: GuestReader, name: str) -> bool:
    return status_of(reader, PurePosixPath(name)) is not None


def _entries(reader: GuestReader, name: str) -> int:
    names = reader.list_directory(PurePosixPath(name))
    return sum(not entry.startswith((".", "README")) for entry in names)
