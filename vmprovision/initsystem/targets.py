"""Find the target that a systemd guest boots into, from its unit files.

systemd.unit(5) defines where units are, and how drop-ins and links among them count;
bootup(7), which units start; systemd(1), what the kernel's command line changes.  Only
targets are followed: other units rarely pull one in, and a service can always go into
the target that boots.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from vmprovision.errors import printable
from vmprovision.filesystem.protocol import follow, read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vmprovision.filesystem.protocol import GuestReader

DEFAULT = "default.target"
USUAL = "multi-user.target"
# The first of these that has a unit wins.  Units below /run are made at boot.
FOLDERS = (
    "/etc/systemd/system.control",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
# In these no services run, or the machine does not stay up.
DEAD_ENDS = {
    *("rescue.target", "emergency.target", "shutdown.target", "umount.target", "final.target"),
    *("halt.target", "poweroff.target", "reboot.target", "kexec.target", "soft-reboot.target"),
    *("exit.target", "sleep.target", "suspend.target", "hibernate.target"),
}
_STRONG = ("Requires", "BindsTo", "Requisite")
_WEAK = ("Wants", "Upholds", "RequiresOverridable")
_LINKS = {".wants": False, ".requires": True, ".upholds": False}

UNIT_LIMIT = 64 << 10
UNITS_LIMIT = 100
LINKS_LIMIT = 8
ENTRIES_LIMIT = 500
NAME_LIMIT = 255


class BootTarget(NamedTuple):
    """The target in which a service must be enabled.

    Attributes:
        name: the target's name; ``multi-user.target`` if boot reaches it.
        obstacle: why no service can start there, as a sentence; empty if one can.
    """

    name: str = USUAL
    obstacle: str = ""


def find_boot_target(reader: GuestReader, units: Iterable[str | None]) -> BootTarget:
    """Return the target into which a service goes so that it starts at boot.

    Args:
        reader: the guest's files.
        units: the units that the boot menu names for systemd; None means ``default.target``.
    """
    files = _UnitFiles(reader)
    if not files.places(DEFAULT) and not files.places(USUAL):
        return BootTarget()  # a part of a guest, without its units
    wanted = list(dict.fromkeys(unit or DEFAULT for unit in units)) or [DEFAULT]
    found = list(dict.fromkeys(_reached(files, unit) for unit in wanted[:LINKS_LIMIT]))
    if len(found) > 1:
        names = ", ".join(dict.fromkeys(each.name for each in found))
        return BootTarget(obstacle=f"the boot menu's entries start different targets: {names}")
    return found[0]


def _reached(files: _UnitFiles, start: str) -> BootTarget:
    """Return ``multi-user.target`` if starting this unit reaches it, else the unit itself."""
    first = files.unit(start)
    called = first.names[-1] if start == first.names[-1] else f"{start}, which is {first.names[-1]}"
    if first.state != "there":
        return BootTarget(obstacle=f"it boots into {called}, which is {first.state}")
    name = first.names[-1]
    if name in DEAD_ENDS or not name.endswith(".target"):
        return BootTarget(obstacle=f"it boots into {called}, where no services are started")
    seen = {name}
    todo = deque([(first, True)])
    while todo and len(seen) <= UNITS_LIMIT:
        unit, is_needed = todo.popleft()
        if unit.names[-1] == USUAL:
            return BootTarget()
        for other, is_strong in files.dependencies(unit):
            found = files.unit(other)
            if found.state != "there":
                if is_needed and is_strong:
                    return BootTarget(
                        obstacle=f"it boots into {called}, and {unit.names[-1]} needs {other}, "
                        f"which is {found.state}"
                    )
            elif found.names[-1] not in seen:
                seen.add(found.names[-1])
                todo.append((found, is_needed and is_strong))
    return BootTarget(name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A unit: its names along the links that were followed, its own name last."""

    names: tuple[str, ...]
    state: Literal["there", "masked", "missing"]
    path: PurePosixPath | None = None


@dataclass(slots=True)
class _UnitFiles:
    """The guest's unit files, each read once."""

    reader: GuestReader
    folders: list[PurePosixPath] = field(default_factory=list)
    units: dict[str, _Unit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """List the folders that exist, each once."""
        found = dict.fromkeys(follow(self.reader, PurePosixPath(name)) for name in FOLDERS)
        self.folders = [path for path in found if path and self.reader.list_directory(path)]

    def places(self, name: str) -> list[PurePosixPath]:
        """Return the paths that have this name, in order of precedence."""
        paths = [folder / name for folder in self.folders]
        return [path for path in paths if self.reader.lstat(path) is not None]

    def unit(self, name: str) -> _Unit:
        """Return the unit of this name."""
        if name not in self.units:
            self.units[name] = self._look_up(name)
        return self.units[name]

    def _look_up(self, name: str) -> _Unit:
        names = [name]
        for _ in range(LINKS_LIMIT):
            path = next(iter(self.places(names[-1])), None)
            if path is None:
                break
            status = self.reader.lstat(path)
            if status is not None and status.kind == "symlink":
                target = PurePosixPath(self.reader.readlink(path)).name
                if target != names[-1] and target.endswith(".target"):
                    names.append(target)
                    continue
            return self._ending(tuple(names), path)
        return _Unit(names=tuple(names), state="missing")

    def _ending(self, names: tuple[str, ...], path: PurePosixPath) -> _Unit:
        """Return the unit at a path that is not an alias; an empty file masks the unit."""
        real = follow(self.reader, path)
        status = self.reader.lstat(real) if real else None
        if real == PurePosixPath("/dev/null") or (
            status and status.kind == "file" and not status.size
        ):
            return _Unit(names=names, state="masked")
        if status is None or status.kind != "file":
            return _Unit(names=names, state="missing")
        return _Unit(names=names, state="there", path=real)

    def dependencies(self, unit: _Unit) -> Iterator[tuple[str, bool]]:
        """Yield the targets that a unit pulls in, and whether it needs them."""
        texts = [read_text(self.reader, unit.path, UNIT_LIMIT) or ""] if unit.path else []
        for folder in self.folders:
            for name in unit.names:
                texts += self._drop_ins(folder / f"{name}.d")
                for ending, is_strong in _LINKS.items():
                    for entry in self._names(folder / f"{name}{ending}"):
                        if entry.endswith(".target"):
                            yield entry, is_strong
            texts += self._drop_ins(folder / "target.d")
        for text in texts:
            yield from _stated(text)

    def _names(self, path: PurePosixPath) -> list[str]:
        real = follow(self.reader, path)
        return self.reader.list_directory(real)[:ENTRIES_LIMIT] if real else []

    def _drop_ins(self, folder: PurePosixPath) -> list[str]:
        names = [name for name in self._names(folder) if name.endswith(".conf")]
        return [
            read_text(self.reader, folder / name, UNIT_LIMIT) or "" for name in names[:LINKS_LIMIT]
        ]


def _stated(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the targets that a unit file names in its ``[Unit]``, and whether it needs them."""
    section = "[Unit]"
    for line in text.replace("\\\n", " ").splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped
        key, equals, value = stripped.partition("=")
        key = key.strip()
        if section != "[Unit]" or not equals or key not in (*_STRONG, *_WEAK):
            continue
        for name in value.split():
            if name.endswith(".target") and len(name) <= NAME_LIMIT and "/" not in name:
                yield printable(name), key in _STRONG
