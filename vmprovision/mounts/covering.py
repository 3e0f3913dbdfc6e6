"""Find the guest's mounts that cover given directories."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import ROOT, follow
from vmprovision.mounts.autofs import find_automounts
from vmprovision.mounts.fstab import read_fstab
from vmprovision.mounts.units import (
    find_mount_units,
    is_masked,
    is_started,
    read_mount,
    unit_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.mounts.guestmount import GuestMount
    from vmprovision.mounts.units import MountUnit


PATH_LIMIT = 4096  # PATH_MAX of limits.h


def covering_mounts(
    reader: GuestReader, directories: Iterable[PurePosixPath]
) -> tuple[GuestMount, ...]:
    """Return the guest's mounts on or above these directories, parents first.

    A mount of a directory on itself is left out, because it hides nothing. A mount that
    is not made at boot (``noauto``) is included; ``at_boot`` distinguishes the two.

    Raises:
        InspectionError: the guest's files cannot be read.
    """
    places = Places(reader)
    covered: set[str] = set()
    for directory in directories:
        if (real := places.find(str(directory))) is not None:
            covered |= {real, *map(str, PurePosixPath(real).parents)}
    covered.discard("/")
    found = {
        (mount.source, mount.place): mount
        for mount in _declared(reader, places, covered)
        if not (mount.is_bind and places.find(mount.source) == str(mount.place))
    }
    return tuple(sorted(found.values(), key=lambda mount: len(mount.place.parts)))


def _declared(reader: GuestReader, places: Places, covered: set[str]) -> Iterator[GuestMount]:
    """Return the mounts that cover one of the places, each with its own place."""
    units = {
        name: unit
        for name, unit in find_mount_units(reader).items()
        if places.find(str(unit.mountpoint)) in covered
    }
    lines = [line for line in read_fstab(reader) if places.find(line.mountpoint) in covered]
    of_fstab = list(_placed([line.as_mount() for line in lines], places, covered))
    started: list[MountUnit] = []
    for mount in of_fstab:
        unit = units.get(unit_name(mount.place))
        if unit is None or not unit.is_own:
            yield mount
        elif not is_masked(reader, unit) and mount.at_boot:
            started.append(unit)
    named = {unit_name(mount.place) for mount in of_fstab}
    started += [u for u in units.values() if u.name not in named and is_started(reader, u)]
    of_units = [read_mount(reader, unit, units) for unit in started]
    more = [each for each in of_units if each is not None]
    yield from _placed([*more, *find_automounts(reader)], places, covered)


def _placed(
    mounts: Iterable[GuestMount], places: Places, covered: set[str]
) -> Iterator[GuestMount]:
    for mount in mounts:
        place = places.find(str(mount.mountpoint))
        if place is not None and place in covered:
            yield replace(mount, place=PurePosixPath(place))


def innermost(path: PurePosixPath, mountpoints: Iterable[PurePosixPath]) -> PurePosixPath:
    """Return the innermost mountpoint above a path that is free of links; ``/`` if no other."""
    points = set(mountpoints)
    return next((each for each in (path, *path.parents) if each in points), ROOT)


@dataclass(slots=True)
class Places:
    """The real paths of guest paths; each directory is looked up once for all of them.

    Paths are strings here, because an fstab may name fifty thousand that do not exist.
    """

    reader: GuestReader
    known: dict[str, str | None] = field(default_factory=lambda: {"": ""})
    names: dict[str, set[str]] = field(default_factory=dict)

    def find(self, path: str) -> str | None:
        """Return the path with its links followed, or None if they lead in a circle."""
        plain = posixpath.normpath(path)
        if "/.." in path or len(path) > PATH_LIMIT:
            return self._resolve(path)
        parts = plain.lstrip("/").split("/")
        real: str | None = ""
        here = ""
        for part in parts if plain.strip("/") else ():
            here = f"{here}/{part}"
            if here not in self.known:
                self.known[here] = None if real is None else self._below(real, part)
            real = self.known[here]
        return "/" if real == "" else real

    def _below(self, folder: str, name: str) -> str | None:
        """Return the real path of an entry of a real directory."""
        if folder not in self.names:
            self.names[folder] = set(self.reader.list_directory(PurePosixPath(folder or "/")))
        path = f"{folder}/{name}"
        status = self.reader.lstat(PurePosixPath(path)) if name in self.names[folder] else None
        return self._resolve(path) if status is not None and status.kind == "symlink" else path

    def _resolve(self, path: str) -> str | None:
        real = follow(self.reader, PurePosixPath(path)) if len(path) <= PATH_LIMIT else None
        return str(real) if real else None
