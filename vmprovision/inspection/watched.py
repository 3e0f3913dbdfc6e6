"""Read a guest's files within a budget, so that inspection ends whatever they hold.

Every parser of guest text has limits of its own. This budget limits all of them
together. It refuses a guest that leads from one question to the next, or from one large
file to the next, before it holds up the host. It counts questions, bytes and processor
seconds of this thread, not time on the clock. So a loaded host refuses no guest that an
idle one accepts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmprovision.errors import InspectionError

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import FileStatus, GuestReader

# The tests' guests need at most 600 questions, 10 MiB and half a second.
QUESTIONS = 50_000
BYTES = 256 << 20
SECONDS = 30.0


class WatchedReader:
    """A ``GuestReader`` that passes calls on to another one until the budget is spent.

    After that, every method raises ``InspectionError``.
    """

    def __init__(self, reader: GuestReader) -> None:
        """Start the budget for reading this guest."""
        self._reader = reader
        self._questions = 0
        self._bytes = 0
        self._began = time.thread_time()

    def _spend(self, path: PurePosixPath, size: int = 0) -> None:
        self._questions += 1
        self._bytes += size
        seconds = time.thread_time() - self._began
        if self._questions > QUESTIONS or self._bytes > BYTES or seconds > SECONDS:
            raise InspectionError(
                f"inspecting the guest takes too much, last at guest path {path}: "
                f"{self._questions} questions, {self._bytes >> 20} MiB, "
                f"{seconds:.0f} s of processor time",
                hint="look for a file there that is far larger or deeper than usual",
            )

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """Implement ``GuestReader.lstat``."""
        self._spend(path)
        return self._reader.lstat(path)

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """Implement ``GuestReader.read``."""
        self._spend(path)
        content = self._reader.read(path, limit=limit, offset=offset)
        self._spend(path, len(content))
        return content

    def load(self, path: PurePosixPath, *, limit: int) -> tuple[FileStatus, bytes]:
        """Implement ``GuestReader.load``."""
        self._spend(path)
        status, content = self._reader.load(path, limit=limit)
        self._spend(path, len(content))
        return status, content

    def readlink(self, path: PurePosixPath) -> str:
        """Implement ``GuestReader.readlink``."""
        self._spend(path)
        return self._reader.readlink(path)

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """Implement ``GuestReader.list_directory``."""
        self._spend(path)
        return self._reader.list_directory(path)

    def label(self, path: PurePosixPath) -> str | None:
        """Implement ``GuestReader.label``."""
        self._spend(path)
        return self._reader.label(path)

    def takes_labels(self) -> bool:
        """Implement ``GuestReader.takes_labels``."""
        return self._reader.takes_labels()
