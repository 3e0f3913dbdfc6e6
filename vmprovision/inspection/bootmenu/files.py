"""The files of boot menus, read within a budget, and the facts of a menu's entries.

Guest text is hostile: a menu may source other files, which may source more, and many
links may lead to one file. So each file is read once, and all of them share one limit.
A part that is not read becomes a doubt; it is never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import InspectionError, printable
from vmprovision.filesystem.protocol import TEXT_LIMIT, resolve
from vmprovision.inspection.bootmenu.rootoptions import WORD_LIMIT, RootOptions, root_options
from vmprovision.mounts import read_fstab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.filesystem.protocol import GuestReader

TOTAL_LIMIT = 4 << 20
FILES_LIMIT = 400
WORK_LIMIT = 20 << 20
ENTRY_LIMIT = 200
TITLE_LIMIT = 200
SUBVOLUMES_LIMIT = 64  # each path of a menu is compared with all of them

# options that name a target for systemd (systemd(1), "Kernel command line")
_TARGETS = {
    **dict.fromkeys(("-b", "emergency"), "emergency.target"),
    **dict.fromkeys(("rescue", "single", "s", "S", "1"), "rescue.target"),
    **dict.fromkeys(("2", "3", "4"), "multi-user.target"),
    "5": "graphical.target",
}
# what they have sealed by dm-verity (systemd-veritysetup-generator(8); Flatcar's have a prefix)
_SEALS = {"roothash": "/", "usrhash": "/usr"}
REPAIRS = ("rescue.target", "emergency.target")
_UNIT_OPTION = "systemd.unit="


class NotUnderstoodError(Exception):
    """Part of a menu is not read or not understood; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEntry:
    """One entry of a menu.

    Attributes:
        title: the title in the menu.
        init: the path in ``init=``, or None if the kernel's own order decides.
        unit: the unit that systemd is to start, or None if ``default.target`` decides.
        ostree: the path of an OSTree deployment in ``ostree=``, or None.
        seals: the options by which the kernel gets the hash of a sealed filesystem, each with
            the place where that is mounted.
        roots: what the command line says of the root filesystem; more than one if that depends
            on the running machine.
        name: another name, beside the title, by which the menu's default may select it.
        doubt: the part that is not understood and may name another init; empty if none.
        kernel: the boot loader's path of the kernel, if the entry is of the Boot Loader
            Specification.
        initrd: likewise of its initial RAM disk.
        options: likewise the kernel's command line.
    """

    title: str
    init: PurePosixPath | None
    unit: str | None = None
    ostree: PurePosixPath | None = None
    seals: tuple[tuple[str, PurePosixPath], ...] = ()
    roots: tuple[RootOptions, ...] = ()
    name: str = ""
    doubt: str = ""
    kernel: str = ""
    initrd: str = ""
    options: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootMenu:
    """The entries of one boot loader's file.

    Attributes:
        path: the menu's file.
        default: the entry that boots unless a person chooses, or None if that is not to
            be found out.
        entries: all entries, including the default.
        unread: parts that are not read or understood and may concern any entry.
    """

    path: PurePosixPath
    default: BootEntry | None
    entries: tuple[BootEntry, ...]
    unread: str = ""

    @property
    def may_boot(self) -> tuple[BootEntry, ...]:
        """The entries that may boot: one if the menu decides, more if it does not."""
        return (self.default,) if self.default else self.entries

    @property
    def inits(self) -> tuple[PurePosixPath | None, ...]:
        """The ``init=`` paths that this menu may start, each once."""
        return tuple(dict.fromkeys(entry.init for entry in self.may_boot))

    @property
    def units(self) -> tuple[str | None, ...]:
        """The units that this menu may start, each once; units for repairs only if all are."""
        found = dict.fromkeys(entry.unit for entry in self.may_boot)
        return tuple(unit for unit in found if unit not in REPAIRS) or tuple(found)

    @property
    def doubt(self) -> str:
        """Why it is uncertain what this menu starts; empty if it is certain."""
        return self.unread or next((entry.doubt for entry in self.may_boot if entry.doubt), "")


def entry_of(title: str, options: str, *, name: str = "", doubt: str = "") -> BootEntry:
    """Return the entry that starts a kernel with these options."""
    return BootEntry(
        title=shown(title),
        init=init_option(options),
        unit=unit_option(options),
        ostree=path_option("ostree", options),
        seals=seal_options(options),
        roots=(root_options(options),),
        name=name,
        doubt=doubt,
    )


def shown(text: str) -> str:
    """Return text of the guest in a form fit for a report."""
    return printable(text[:TITLE_LIMIT])


def init_option(line: str) -> PurePosixPath | None:
    """Return the path in the last ``init=`` of a command line; the kernel obeys the last."""
    return path_option("init", line)


def path_option(name: str, line: str) -> PurePosixPath | None:
    """Return the absolute path in a command line's last option of this name."""
    head = f"{name}="
    values = [word[len(head) :] for word in _words(line) if word.startswith(f"{head}/")]
    return PurePosixPath(printable(values[-1])) if values else None


def seal_options(line: str) -> tuple[tuple[str, PurePosixPath], ...]:
    """Return the options of a command line that carry a root hash, each with its mountpoint."""
    names = dict.fromkeys(word.partition("=")[0] for word in _words(line) if "=" in word)
    found = ((name, _SEALS.get(name.removeprefix("verity."))) for name in names)
    return tuple((name, PurePosixPath(place)) for name, place in found if place)


def unit_option(line: str) -> str | None:
    """Return the unit that a command line names for systemd; the last option counts."""
    found = None
    for word in _words(line):
        if word.startswith(_UNIT_OPTION):
            found = shown(word.removeprefix(_UNIT_OPTION))
        else:
            found = _TARGETS.get(word, found)
    return found


def _words(line: str) -> list[str]:
    return [word.strip("\"'") for word in line.split() if len(word) <= WORD_LIMIT]


def lines_in_force(text: str) -> list[str]:
    """Return the lines that are neither empty nor comments, without surrounding blanks."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def settings(text: str) -> dict[str, str]:
    """Return the settings of grubenv and loader.conf: NAME=VALUE, or NAME VALUE."""
    return dict(keyword(line) for line in lines_in_force(text))


def keyword(line: str) -> tuple[str, str]:
    """Return the first word of a line, and what follows the blanks or equals sign after it."""
    for at, char in enumerate(line):
        if char in "= \t":
            return line[:at], line[at + 1 :].lstrip().removeprefix("=").strip()
    return line, ""


class MenuFiles:
    """The guest's files for all its menus, with one budget."""

    def __init__(self, reader: GuestReader, subvolume: str = "") -> None:
        """Keep the guest's files, and the name of the btrfs subvolume that is its root."""
        self.reader = reader
        self._root = subvolume
        self._texts: dict[PurePosixPath, str] = {}
        self._left = TOTAL_LIMIT
        self._work = WORK_LIMIT

    def spend(self, work: int) -> None:
        """Take a part of the budget of all menus, in about one unit a character.

        Raises:
            NotUnderstoodError: the budget is used up.
        """
        self._work -= work
        if self._work < 0:
            raise NotUnderstoodError("the boot menus take more work than any real one")

    def real_path(self, path: PurePosixPath) -> PurePosixPath | None:
        """Return the real path of the regular file at path, or None."""
        try:
            real = resolve(self.reader, path)
            status = self.reader.lstat(real)
        except InspectionError:
            return None
        return real if status is not None and status.kind == "file" else None

    def text(self, path: PurePosixPath) -> str:
        """Return a file's text; empty if there is none.

        Raises:
            NotUnderstoodError: the file is too large.
        """
        real = self.real_path(path)
        if real is None:
            return ""
        if real not in self._texts:
            content = self.reader.read(real, limit=min(TEXT_LIMIT, self._left) + 1)
            if len(content) > min(TEXT_LIMIT, self._left) or len(self._texts) >= FILES_LIMIT:
                raise NotUnderstoodError(f"{path} is too large to be read as a boot menu")
            self._left -= len(content)
            self._texts[real] = content.decode("utf-8", errors="replace")
        return self._texts[real]

    def places(self, path: str) -> Iterator[PurePosixPath]:
        """Yield the guest paths that a boot loader's path may mean.

        A boot loader counts from the root of a filesystem, which may be mounted on
        ``/boot`` or ``/boot/efi``. For btrfs that is the top level, above the subvolumes
        that fstab mounts.
        """
        here = PurePosixPath("/") / path.lstrip("/")
        for subvolume, place in self._subvolumes:
            if here.is_relative_to(subvolume):
                yield place / here.relative_to(subvolume)
        for mountpoint in ("/", "/boot", "/boot/efi", "/boot/firmware"):
            yield PurePosixPath(mountpoint) / path.lstrip("/")

    @cached_property
    def _subvolumes(self) -> list[tuple[PurePosixPath, PurePosixPath]]:
        """The mounted subvolumes, as paths below the top level, with their places.

        The root's may be named only by the kernel's command line; all others are in fstab.
        """
        found = [(PurePosixPath("/", self._root), PurePosixPath("/"))] if self._root else []
        for line in read_fstab(self.reader):
            options = dict(option.partition("=")[::2] for option in line.options.split(","))
            if subvolume := options.get("subvol", "").strip("/"):
                found.append((PurePosixPath("/", subvolume), PurePosixPath(line.mountpoint)))
        return found[:SUBVOLUMES_LIMIT]

    def find(self, path: str) -> PurePosixPath | None:
        """Return the regular file that a boot loader means by this path, or None."""
        if len(path) > WORD_LIMIT or "\0" in path:
            return None
        return next((real for each in self.places(path) if (real := self.real_path(each))), None)
