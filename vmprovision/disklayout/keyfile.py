"""Key files of encrypted volumes: which volume each unlocks, and the key in it.

A selector has the form of libguestfs's own tools, ``ID:file:FILENAME``
(virt-customize(1), ``--key``). A key never appears in an argument list, message, log or
report. Until a volume is unlocked, only the file's path is passed on.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from vmprovision.errors import PlanError

log = logging.getLogger(__name__)

EVERY_VOLUME = "all"
SIZE_LIMIT = 8 << 20  # cryptsetup(8)'s limit
HINT = "write --key DEVICE:file:PATH, with the device, its UUID or `all` in place of DEVICE"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """A file whose content unlocks an encrypted volume.

    Attributes:
        path: the file, on the host that does the work.
        volume: the volume's device as inspection names it (``/dev/sda2``, ``/dev/vg/root``),
            its UUID, or ``all`` for every volume.
    """

    path: Path
    volume: str = EVERY_VOLUME


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The content of a key file when it was read."""

    file: KeyFile
    content: bytes = field(repr=False)

    def fits(self, *names: str) -> bool:
        """Return whether the key is meant for the volume with these names."""
        wanted = self.file.volume.removeprefix("UUID=").lower()
        return wanted == EVERY_VOLUME or wanted in [name.lower() for name in names]

    @property
    def is_for_one(self) -> bool:
        """Whether the key is meant for one volume, not for every volume that it opens."""
        return self.file.volume != EVERY_VOLUME

    def passphrases(self) -> list[bytes]:
        """Return the passphrases that the file may hold, the most likely first.

        cryptsetup(8) uses the whole file up to the last newline. libguestfs's tools
        used the first line without its newline for years.
        """
        line, newline, rest = self.content.partition(b"\n")
        is_one_line = bool(newline) and not rest and b"\0" not in line
        readings = [line, self.content] if is_one_line else [self.content, line]
        return [reading for reading in dict.fromkeys(readings) if reading]


def parse_selector(selector: str) -> KeyFile:
    """Parse ``DEVICE:file:PATH``.

    Raises:
        PlanError: the form is wrong. The message does not repeat the text, which may hold a key.
    """
    volume, _, rest = selector.partition(":")
    kind, _, path = rest.partition(":")
    if kind == "key":
        raise PlanError(
            "--key takes a file, not a key: every user could read the key in the process list",
            hint="put the key into a file of mode 0600; " + HINT,
        )
    if kind == "clevis":
        raise PlanError(
            "--key cannot unlock by Clevis: the appliance has no network",
            hint="add a passphrase with cryptsetup(8); " + HINT,
        )
    if kind != "file" or not volume or not path:
        raise PlanError("a --key is not of the form DEVICE:file:PATH", hint=HINT)
    return KeyFile(path=Path(path), volume=volume)


def read_keys(files: tuple[KeyFile, ...]) -> tuple[Key, ...]:
    """Read the key files.

    Raises:
        PlanError: a key file is missing, empty, too large or not a regular file.
    """
    return tuple(Key(file=file, content=_read(file.path)) for file in files)


def _read(path: Path) -> bytes:
    try:
        # opening or reading a pipe without a writer would block for ever
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as exc:
        cause = exc.strerror if isinstance(exc, OSError) else exc
        raise PlanError(
            f"the key file {path} cannot be read: {cause}", hint="check its path and mode"
        ) from exc
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise PlanError(
                f"the key file {path} is not a regular file", hint="write the key into a file first"
            )
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            log.warning("other users can read the key file %s: run chmod 600 on it", path)
        with open(handle, "rb", closefd=False) as file:
            content = file.read(SIZE_LIMIT + 1)
    finally:
        os.close(handle)
    if not 0 < len(content) <= SIZE_LIMIT:
        what = "empty" if not content else f"larger than {SIZE_LIMIT >> 20} MiB"
        raise PlanError(f"the key file {path} is {what}", hint="check which file it is")
    return content
