"""Files of the host that a bake writes: hashes, checksums, and folders that appear whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError, ImageSpaceError
from vmprovision.host.sync import sync_path
from vmprovision.image.preconditions import host_failures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmprovision.progress import Control

BLOCK = 1 << 20
SUMS = "SHA256SUMS"
SUMS_LIMIT = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_HERE = -100  # AT_FDCWD (openat(2))
_EXCHANGE = 2  # RENAME_EXCHANGE (renameat2(2))
_LIBC = ctypes.CDLL(None, use_errno=True)


def hash_file(path: Path, control: Control | None = None) -> str:
    """Return the SHA-256 of a file of the host, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if control is not None and control.cancelled.is_set():
                control.step("hashing")  # raises
    return digest.hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write, by this process or a program, into an error that names the file.

    Raises:
        ImageSpaceError: the host has no free space.
        ImageError: the host's filesystem failed in another way.
    """
    try:
        with host_failures(path):
            yield
    except CommandError as exc:
        if "No space left" not in exc.message:
            raise
        raise ImageSpaceError(
            f"{path} cannot be written: {exc.message}",
            hint="make room there and run the command again",
        ) from exc


def write_sums(folder: Path, control: Control) -> dict[str, str]:
    """Write ``SHA256SUMS`` over all files of a folder; return it, by relative path."""
    sums = {name: hash_file(folder / name, control) for name in _names(folder)}
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (folder / SUMS).write_text(text, encoding="utf-8")
    return sums


def has_right_sums(folder: Path, control: Control) -> bool:
    """Return whether a folder has exactly the regular files in its ``SHA256SUMS``."""
    try:
        with (folder / SUMS).open(encoding="utf-8") as file:
            lines = file.read(SUMS_LIMIT).splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    matches = [_LINE.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if not lines or len(sums) != len(lines) or set(sums) != set(_names(folder)):
        return False
    try:
        return all(hash_file(folder / name, control) == sums[name] for name in sums)
    except OSError:
        return False


def _names(folder: Path) -> list[str]:
    """Return the files below a folder by relative path; a link counts under its own name."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path != folder / SUMS
    )


def sync_tree(folder: Path) -> None:
    """Wait until the disk holds everything in a folder."""
    for path in [folder, *folder.rglob("*")]:
        sync_path(path)


def put_in_place(folder: Path, target: Path) -> None:
    """Give a finished folder its name; an older folder of that name gets the finished one's.

    Both happen at once (renameat2(2)), so an output always exists. If the filesystem
    cannot exchange names, the old folder is moved aside first.

    Raises:
        OSError: it cannot be done.
    """
    if target.exists():
        _exchange(folder, target)
    else:
        folder.rename(target)
    sync_path(target.parent)


def _exchange(folder: Path, target: Path) -> None:
    failed = _LIBC.renameat2(
        _HERE, os.fsencode(folder), _HERE, os.fsencode(target), ctypes.c_uint(_EXCHANGE)
    )
    if failed:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(target))
        aside = folder.with_name(folder.name + ".old")
        target.rename(aside)
        folder.rename(target)
