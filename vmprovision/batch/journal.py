"""Which images of a batch are done, in a file, so that an interrupted batch goes on.

One JSON object a line, appended as a whole and made durable when an image is done.
An entry counts as long as the image is the file of that size and time, and the
same agent is wanted with the same options.  The truth stays with the images: one
that is looked at without need is found to be as wanted.
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
    """What is done, and the open file that more is written to.

    Attributes:
        path: the file.
        handle: the file, open for appending.
        entries: image -> what its last line says.
    """

    path: Path
    handle: int
    entries: dict[str, dict[str, Any]]

    def holds(self, image: Path, wanted: str) -> bool:
        """Whether the image is done as wanted, and has not been changed since.

        Args:
            image: the file that was to be finished.
            wanted: stands for everything that was wanted of it.
        """
        entry = self.entries.get(_name(image))
        return entry is not None and entry == _entry(image, wanted)

    def add(self, image: Path, wanted: str) -> None:
        """Write down that the image is done; a directory's state cannot be told, and is left out.

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
    """The journal in a file, which is made where there is none.

    Raises:
        PlanError: the file cannot be read or written, or is something else.
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
        raise _something_else(path)
    content = path.read_bytes()
    if not content:
        _append(handle, HEADER)
        return {}
    lines = content.split(b"\n")
    if _parsed(lines[0]) != HEADER:
        raise _something_else(path)
    if lines[-1]:  # torn by a crash: what follows begins a line of its own
        os.write(handle, b"\n")
    entries = [entry for line in lines[1:] if (entry := _parsed(line))]
    return {str(entry.get("image")): entry for entry in entries}


def _something_else(path: Path) -> PlanError:
    return PlanError(
        f"{path} is not the journal of a batch", hint="name a file that is there for that alone"
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
