"""The automounter's mounts, made at the first access: auto.master(5), autofs(5)."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.mounts.guestmount import GuestMount

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.filesystem.protocol import GuestReader

PROGRAM = "/usr/sbin/automount"
MASTER = PurePosixPath("/etc/auto.master")
MORE = PurePosixPath("/etc/auto.master.d")
MAP_LIMIT = 256 << 10
MAPS_LIMIT = 100


def find_automounts(reader: GuestReader) -> list[GuestMount]:
    """Return the mountpoints of the guest's automounter, or none if it is not installed."""
    if resolved_file(reader, PROGRAM) is None:
        return []
    names = [name for name in reader.list_directory(MORE) if name.endswith(".autofs")]
    masters = [MASTER, *(MORE / name for name in names[:MAPS_LIMIT])]
    return [mount for master in masters for mount in _in_master(reader, master)]


def _in_master(reader: GuestReader, master: PurePosixPath) -> Iterator[GuestMount]:
    direct = 0
    for point, source in _pairs(reader, master):
        if point.startswith("/") and point != "/-":
            yield _automount(source, point, master)
        elif point == "/-" and direct < MAPS_LIMIT:
            direct += 1
            path = PurePosixPath(source.removeprefix("file:"))
            for below, location in _pairs(reader, path) if path.is_absolute() else ():
                if below.startswith("/"):
                    yield _automount(location, below, path)


def _pairs(reader: GuestReader, path: PurePosixPath) -> Iterator[tuple[str, str]]:
    """Yield the first and the last word of each line with at least two words; skip comments."""
    for line in (read_text(reader, path, MAP_LIMIT) or "").split("\n"):
        words = line.split()
        if len(words) > 1 and not words[0].startswith("#"):
            place = words[1] if path == MASTER or path.parent == MORE else words[-1]
            yield words[0], place


def _automount(source: str, mountpoint: str, origin: PurePosixPath) -> GuestMount:
    path = PurePosixPath(mountpoint)
    return GuestMount(
        source=source, mountpoint=path, place=path, kind="autofs", options=(), origin=str(origin)
    )
