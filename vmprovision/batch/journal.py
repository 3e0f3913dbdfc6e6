"""A file that records the finished images of a batch, so that it can be resumed.

It has one JSON object per line, appended as a whole and synced when an image is
finished.  An entry is valid while the image has the recorded size and modification
time, and the same agent is injected with the same options.  The journal only saves
time: checking a finished image again is harmless.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

HEADER = {"vmprovision": "journal", "schema": 1}
SIZE_LIMIT = 256 << 20


@dataclass(slots=True, kw_only=True)
class Journal:
    """The finished images, and the open file to which more are appended.

    Attributes:
        path: the file.
        handle: the file, open for appending.
        entries: the last entry of each image, by its path.
    """

    path: Path
    handle: int
    entries: dict[str, dict[str, Any]]

    def holds(self, image: Path, wanted: str) -> bool:
        """Return whether the image is finished with these options, and unchanged since.

        Args:
            image: the file.
            wanted: a digest of the agent and the options.
        """
        entry = self.entries.get(_name(image))
        return entry is not None and entry == _entry(image, wanted)

    def add(self, image: Path, wanted: str) -> None:
        """Record that the image is finished; ignore a directory, whose changes go unnoticed.

        Raises:
            OSError: the file cannot be written.
        """
        entry = _entry(image, wanted)
        if entry is not None:
            _append(self.handle, entry)
            self.entries[_name(image)] = entry

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)


def open_journal(path: Path) -> Journal:
    """Open the journal in a file; create the file if it does not exist.

    Raises:
        PlanError: the file cannot be read or written, or is not a journal.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise PlanError(f"the journal {path} cannot be opened: {exc.strerror}") from exc
    try:
        return Journal(path=path, handle=handle, entries=_read(path, handle))
    except OSError as exc:
        os.close(handle)
        raise PlanError(f"the journal {path} cannot be used: {exc.strerror}") from exc
    except BaseException:
        os.close(handle)
        raise


def _read(path: Path, handle: int) -> dict[str, dict[str, Any]]:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > SIZE_LIMIT:
        raise _not_a_journal(path)
    content = path.read_bytes()
    if not content:
        _append(handle, HEADER)
        return {}
    lines = content.split(b"\n")
    if _parsed(lines[0]) != HEADER:
        raise _not_a_journal(path)
    if lines[-1]:  # a crash tore the last line: begin a new one
        os.write(handle, b"\n")
    entries = [entry for line in lines[1:] if (entry := _parsed(line))]
    return {str(entry.get("image")): entry for entry in entries}


def _not_a_journal(path: Path) -> PlanError:
    return PlanError(
        f"{path} is not the journal of a batch",
        hint="give a new file, or the journal of an earlier run",
    )


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _append(handle: int, entry: dict[str, Any]) -> None:
    os.write(handle, json.dumps(entry).encode() + b"\n")
    os.fsync(handle)


def _entry(image: Path, wanted: str) -> dict[str, Any] | None:
    try:
        status = image.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return {
        "image": _name(image),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "wanted": wanted,
    }


def _name(image: Path) -> str:
    return str(image.absolute())
