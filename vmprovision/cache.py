"""The directory in which vmprovision keeps what it can make again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "VMPROVISION_CACHE"


def cache_directory() -> Path:
    """``$VMPROVISION_CACHE``, else ``vmprovision`` in the XDG cache directory; not created."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmprovision"


def write_atomically(path: Path, content: bytes) -> None:
    """Put content at path as a whole or not at all; its directory is made, for its owner only.

    Raises:
        OSError: the directory or the file cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
