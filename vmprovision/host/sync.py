"""Make written data durable: a file's content, or a directory's names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def sync_path(path: Path) -> None:
    """Wait until the disk holds the content of a file, or the names in a directory.

    Raises:
        OSError: as open(2) and fsync(2).
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
