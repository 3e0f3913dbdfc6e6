"""Key files of encrypted volumes: which volume each is for, and what is in it.

A selector is written as libguestfs's own tools have it, ``ID:file:FILENAME``
(virt-customize(1), ``--key``).  A key is in no argument list, message, log or
report: what is passed on until a volume is unlocked is the file's path.
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
SIZE_LIMIT = 8 << 20  # as cryptsetup(8) has it
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
    """What a key file held when it was read."""

    file: KeyFile
    content: bytes = field(repr=False)

    def fits(self, *names: str) -> bool:
        """Whether it is meant for the volume that has these names."""
        wanted = self.file.volume.removeprefix("UUID=").lower()
        return wanted == EVERY_VOLUME or wanted in [name.lower() for name in names]

    @property
    def is_for_one(self) -> bool:
        """Whether it is meant for one volume, and not for whichever it opens."""
        return self.file.volume != EVERY_VOLUME

    def passphrases(self) -> list[bytes]:
        """What it may stand for, the likeliest first.

        cryptsetup(8) takes the whole file, to the last newline; libguestfs's tools took
        the first line without its newline for years.
        """
        line, newline, rest = self.content.partition(b"\n")
        is_one_line = bool(newline) and not rest and b"\0" not in line
        readings = [line, self.content] if is_one_line else [self.content, line]
        return [reading for reading in dict.fromkeys(readings) if reading]


def parse_selector(selector: str) -> KeyFile:
    """Read ``DEVICE:file:PATH``.

    Raises:
        PlanError: it is not that; the message does not repeat it, as it may hold a key.
    """
    volume, _, rest = selector.partition(":")
    kind, _, path = rest.partition(":")
    if kind == "key":
        raise PlanError(
            "--key takes no key itself: every user of the host could read it in the list of "
            "processes",
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
        PlanError: one of them is missing, empty, too large or no regular file.
    """
    return tuple(Key(file=file, content=_read(file.path)) for file in files)


def _read(path: Path) -> bytes:
    try:
        # of a pipe that nobody writes to, opening and reading would have no end
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
            log.warning("the key file %s is open to other users: chmod 600 it", path)
        with open(handle, "rb", closefd=False) as file:
            content = file.read(SIZE_LIMIT + 1)
    finally:
        os.close(handle)
    if not 0 < len(content) <= SIZE_LIMIT:
        what = "empty" if not content else f"larger than {SIZE_LIMIT >> 20} MiB"
        raise PlanError(f"the key file {path} is {what}", hint="check which file it is")
    return content
