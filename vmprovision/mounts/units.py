"""systemd's own mounts: systemd.mount(5) and systemd.automount(5).

A unit's name is its mountpoint, escaped (systemd.unit(5)), so the names alone tell
which units matter.  Only those are read: the unit file, its drop-ins, and the units that
may start it.  An administrator's unit takes the place of the fstab line for the same
mountpoint, and a link to ``/dev/null`` masks it; a vendor's unit gives way to fstab.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import follow, read_text, resolved_file
from vmprovision.mounts.guestmount import GuestMount

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmprovision.filesystem.protocol import GuestReader

MANAGERS = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
OWN_FOLDERS = (PurePosixPath("/etc/systemd/system.control"), PurePosixPath("/etc/systemd/system"))
FOLDERS = (
    *OWN_FOLDERS,
    PurePosixPath("/usr/local/lib/systemd/system"),
    PurePosixPath("/usr/lib/systemd/system"),
    PurePosixPath("/lib/systemd/system"),
)
SUFFIXES = (".mount", ".automount")
UNIT_LIMIT = 64 << 10
SCANNED_LIMIT = 2000  # units that are searched for a dependency on this one
_STARTING = (".wants", ".requires", ".upholds")
_DEPENDENCIES = ("wants", "requires", "bindsto", "upholds")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class MountUnit:
    """A mount or automount unit, known only by its name.

    Attributes:
        name: the file name: ``usr-local.mount``.
        folder: the directory of the unit file that is in force.
        mountpoint: the path that the name stands for.
    """

    name: str
    folder: PurePosixPath
    mountpoint: PurePosixPath

    @property
    def is_own(self) -> bool:
        """Whether the administrator made it, so that it overrides fstab."""
        return self.folder in OWN_FOLDERS


def find_mount_units(reader: GuestReader) -> dict[str, MountUnit]:
    """Return the mount and automount units in force, by name; none in a guest without systemd."""
    if not any(resolved_file(reader, path) for path in MANAGERS):
        return {}
    found: dict[str, MountUnit] = {}
    for folder in FOLDERS:
        for name in reader.list_directory(folder):
            if name.endswith(SUFFIXES) and "@" not in name:
                unit = MountUnit(name=name, folder=folder, mountpoint=mountpoint_of(name))
                found.setdefault(name, unit)
    return found


def mountpoint_of(name: str) -> PurePosixPath:
    """Return the path that a mount unit's name stands for."""
    stem = name.rpartition(".")[0]
    plain = "" if stem == "-" else stem.replace("-", "/")
    return PurePosixPath("/" + _ESCAPE.sub(lambda match: chr(int(match[1], 16)), plain))


def unit_name(mountpoint: PurePosixPath) -> str:
    """Return the name of the mount unit for a path, as systemd-escape(1) gives it."""
    parts = ["".join(_escaped(part)) for part in mountpoint.parts[1:]]
    return ("-".join(parts) or "-") + ".mount"


def _escaped(part: str) -> Iterator[str]:
    for number, byte in enumerate(part.encode("utf-8", "surrogateescape")):
        char = chr(byte)
        word = char.isascii() and (char.isalnum() or char in ":_")
        plain = word or (char == "." and number > 0)
        yield char if plain else f"\\x{byte:02x}"


def is_masked(reader: GuestReader, unit: MountUnit) -> bool:
    """Return whether a unit is masked: a link to ``/dev/null`` or an empty file."""
    status = reader.lstat(unit.folder / unit.name)
    if status is not None and status.kind == "symlink":
        return follow(reader, unit.folder / unit.name) == PurePosixPath("/dev/null")
    return status is not None and status.kind == "file" and status.size == 0


def read_mount(
    reader: GuestReader, unit: MountUnit, units: Mapping[str, MountUnit]
) -> GuestMount | None:
    """Return what a unit mounts, or None if it is masked or incomplete."""
    if is_masked(reader, unit):
        return None
    origin = f"the unit {unit.folder / unit.name}"
    if unit.name.endswith(".automount"):
        mount = units.get(unit.name.removesuffix(".automount") + ".mount")
        inner = read_mount(reader, mount, units) if mount else None
        return replace(inner, origin=origin) if inner else None
    settings = _settings(reader, unit)
    if not settings.get("what"):
        return None
    return GuestMount(
        source=settings["what"],
        mountpoint=unit.mountpoint,
        place=unit.mountpoint,
        kind=settings.get("type") or "auto",
        options=tuple(settings.get("options", "").split(",")),
        origin=origin,
    )


def _settings(reader: GuestReader, unit: MountUnit) -> dict[str, str]:
    """Return a unit's [Mount] section with drop-ins, keys in lower case; the last value wins."""
    drop_ins = {
        name: folder / f"{unit.name}.d" / name
        for folder in reversed(FOLDERS)
        for name in reader.list_directory(folder / f"{unit.name}.d")
        if name.endswith(".conf")
    }
    files = [unit.folder / unit.name, *(drop_ins[name] for name in sorted(drop_ins))]
    texts = [read_text(reader, path, UNIT_LIMIT) or "" for path in files]
    return {
        key: value
        for text in texts
        for section, key, value in _assignments(text)
        if section == "mount"
    }


def _assignments(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield section, key and value of each line of a unit file, continued lines joined."""
    section = ""
    for line in text.replace("\\\n", " ").split("\n"):
        stripped = line.strip()
        if stripped.startswith("[") and stripped.endswith("]"):
            section = stripped[1:-1].lower()
        elif "=" in stripped and not stripped.startswith(("#", ";")):
            key, _, value = stripped.partition("=")
            yield section, key.strip().lower(), value.strip()


def is_started(reader: GuestReader, unit: MountUnit) -> bool:
    """Return whether a link or another unit makes systemd start this unit."""
    for folder in FOLDERS:
        for name in reader.list_directory(folder):
            if name.endswith(_STARTING) and unit.name in reader.list_directory(folder / name):
                return True
    return _is_depended_on(reader, unit)


def _is_depended_on(reader: GuestReader, unit: MountUnit) -> bool:
    """Return whether any unit's text requires this one, or a path below it."""
    scanned = 0
    for folder in FOLDERS:
        for name in reader.list_directory(folder):
            if name == unit.name or "." not in name or scanned > SCANNED_LIMIT:
                continue
            scanned += 1
            text = read_text(reader, folder / name, UNIT_LIMIT) or ""
            if any(_asks_for(unit, key, value) for _, key, value in _assignments(text)):
                return True
    return False


def _asks_for(unit: MountUnit, key: str, value: str) -> bool:
    if key in _DEPENDENCIES:
        return unit.name in value.split()
    if key in ("requiresmountsfor", "wantsmountsfor"):
        return any(PurePosixPath(path).is_relative_to(unit.mountpoint) for path in value.split())
    return False
