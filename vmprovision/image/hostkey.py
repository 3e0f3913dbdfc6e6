"""The key that authenticates this user's redo logs on this host."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from vmprovision.errors import ImageError
from vmprovision.host.cache import STATE_VARIABLE, state_directory
from vmprovision.host.sync import sync_path

KEY = "redo-log.key"
KEY_BYTES = 32


def host_key() -> bytes:
    """Return the key; make it if it does not exist.

    Raises:
        ImageError: the key cannot be stored, or others can read it.
    """
    path = state_directory() / KEY
    try:
        if not path.exists():
            _make(path)
        return _read(path)
    except OSError as exc:
        raise ImageError(
            f"cannot store the key for redo logs at {path}: {exc.strerror}",
            hint=f"let {STATE_VARIABLE} name a directory that this user can write to",
        ) from exc


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        content = file.read(KEY_BYTES + 1)
    private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.geteuid() or len(content) != KEY_BYTES:
        raise ImageError(
            f"{path} is damaged, or others can read it",
            hint="delete it; a new key is made, and redo logs sealed with the old one are refused",
        )
    return content


def _make(path: Path) -> None:
    """Store a new key, unless another process has stored one first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()
    sync_path(path.parent)
