"""Recognise a file of the host that has not changed, without reading it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

Identity = list[str | int]


def identity(path: Path) -> Identity:
    """Return a value that changes when a file is replaced or written to.

    Raises:
        OSError: the file cannot be examined.
    """
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]


def digest(content: bytes) -> str:
    """Return the hash of some content."""
    return hashlib.sha256(content).hexdigest()
