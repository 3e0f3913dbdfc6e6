"""What the guest's boot loader tells the kernel: which ``init=``, in which entry of its menu.

GRUB's grub.cfg with grubenv, and menu.lst of GRUB 0.9x; syslinux(1) and extlinux;
the Boot Loader Specification's entries with loader.conf(5).  Only the entry that
boots by default says what process 1 is.  Where it cannot be found and the entries
differ, the menu does not decide, and says so.  ``/etc/default/grub`` and
``/etc/kernel/cmdline`` are what menus are made from, and count where there is none.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import InspectionError, printable
from vmprovision.filesystem import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmprovision.filesystem import GuestReader

BOOT = PurePosixPath("/boot")
EFI = BOOT / "efi/EFI"
GRUB = ("grub/grub.cfg", "grub2/grub.cfg")
GRUB_LEGACY = ("grub/menu.lst", "grub/grub.conf")
SYSLINUX = ("extlinux/extlinux.conf", "syslinux/syslinux.cfg", "extlinux.conf", "syslinux.cfg")
LOADER = tuple(PurePosixPath(path) for path in ("/boot/loader", "/boot/efi/loader", "/efi/loader"))
MENU_SOURCES = tuple(PurePosixPath(path) for path in ("/etc/kernel/cmdline", "/etc/default/grub"))
ENTRY_LIMIT = 200
NESTING_LIMIT = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEntry:
    """One entry of a menu.

    Attributes:
        title: as the menu shows it.
        init: the path in its ``init=``; None where the kernel's own order decides.
        name: what the menu's default may call it by, beside its title.
    """

    title: str
    init: PurePosixPath | None
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootMenu:
    """The entries of one boot loader's file.

    Attributes:
        path: the file.
        default: the entry that boots unless a person chooses; None where that is not to
            be found out.
        entries: all, the default one included.
    """

    path: PurePosixPath
    default: BootEntry | None
    entries: tuple[BootEntry, ...]

    @property
    def inits(self) -> tuple[PurePosixPath | None, ...]:
        """What this menu may start: one where it decides, more where it does not."""
        if self.default:
            return (self.default.init,)
        return tuple(dict.fromkeys(entry.init for entry in self.entries))


@dataclass(slots=True)
class _Node:
    """An entry of grub.cfg or a submenu while it is being read."""

    title: str
    identifier: str = ""
    lines: list[str] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    is_entry: bool = False


def read_boot_menus(reader: GuestReader) -> list[BootMenu]:
    """The menus of all boot loaders that the guest has; none of them need be in use."""
    names = reader.list_directory(BOOT)
    files = [
        (BOOT / path, parse)
        for paths, parse in (
            (GRUB, _grub_menu),
            (GRUB_LEGACY, _legacy_menu),
            (SYSLINUX, _syslinux_menu),
        )
        for path in paths
        if path.split("/")[0] in names
    ]
    vendors = reader.list_directory(EFI) if "efi" in names else []
    files += [(EFI / vendor / "grub.cfg", _grub_menu) for vendor in vendors]
    files.append((PurePosixPath("/extlinux.conf"), _syslinux_menu))
    found = [_menu(reader, path, parse) for path, parse in files]
    found += [_loader_menu(reader, folder) for folder in LOADER]
    menus = [menu for menu in found if menu and menu.entries]
    return menus or [menu for path in MENU_SOURCES if (menu := _source_menu(reader, path))]


def _menu(
    reader: GuestReader,
    path: PurePosixPath,
    parse: Callable[[GuestReader, PurePosixPath, str], BootMenu],
) -> BootMenu | None:
    text = _text(reader, path)
    return parse(reader, path, text) if text else None


def _text(reader: GuestReader, path: PurePosixPath) -> str:
    """A file's text; empty where there is none, or a circle of links, which boots nothing."""
    try:
        return read_text(reader, path) or ""
    except InspectionError:
        return ""


def init_option(line: str) -> PurePosixPath | None:
    """The path in a command line's last ``init=``, which is the one that the kernel obeys."""
    found = re.findall(r'(?:^|[\s"\'])init=(/[^\s"\']+)', line)
    return PurePosixPath(printable(found[-1])) if found else None


def _settings(text: str) -> dict[str, str]:
    """Grubenv's and loader.conf's lines: NAME=VALUE, or NAME VALUE."""
    pairs = re.findall(r"(?m)^([A-Za-z_][\w-]*)(?:=|[ \t]+)(.*?)[ \t]*$", text)
    return dict(pairs)


def _in_force(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _grub_menu(reader: GuestReader, path: PurePosixPath, text: str) -> BootMenu:
    environment = _settings(_text(reader, path.parent / "grubenv"))
    menu = _read_grub(text)
    top = [(node, _entry_of(node)) for node in _leaves(menu)]
    entries = tuple(entry for _, entry in top[:ENTRY_LIMIT])
    chosen = _grub_default(text, environment)
    node = _descend(menu, chosen) if chosen is not None else None
    default = next((entry for leaf, entry in top if leaf is node), None)
    return BootMenu(path=path, default=default, entries=entries)


def _read_grub(text: str) -> _Node:
    """The tree of submenus and entries, by the braces that end and begin lines."""
    root = _Node(title="")
    stack: list[_Node | None] = []  # None for a function's braces
    for line in _in_force(text):
        if len(stack) > NESTING_LIMIT:
            break
        here = next((node for node in reversed(stack) if node), root)
        if re.match(r"(?:menuentry|submenu)\s", line):
            child = _Node(title=_grub_title(line), is_entry=line.startswith("menuentry"))
            named = re.search(r"(?:--id|\$menuentry_id_option)[\s=]+(['\"]?)([^'\"\s]+)\1", line)
            child.identifier = named[2] if named else ""
            here.children.append(child)
            if line.endswith("{"):
                stack.append(child)
        elif line.endswith("{"):
            stack.append(None)
        elif line == "}":
            if stack:
                stack.pop()
        else:
            here.lines.append(line)
    return root


def _grub_title(line: str) -> str:
    try:
        words = shlex.split(line.rstrip("{"), comments=False)
    except ValueError:
        return ""
    return printable(words[1]) if len(words) > 1 else ""


def _leaves(node: _Node) -> list[_Node]:
    """The entries that start a Linux kernel, in the order of the menu."""
    if node.is_entry:
        return [node] if any(re.match(r"linux|module|kernel", line) for line in node.lines) else []
    return [leaf for child in node.children for leaf in _leaves(child)]


def _entry_of(node: _Node) -> BootEntry:
    lines = [line for line in node.lines if re.match(r"(?:linux|module|kernel)\S*\s", line)]
    init = next((found for line in lines if (found := init_option(line))), None)
    return BootEntry(title=node.title, init=init)


def _grub_default(text: str, environment: dict[str, str]) -> str | None:
    """What ``set default=`` says; ``0`` where nothing does, None where it says two things."""
    said = re.findall(r"(?m)^[ \t]*set[ \t]+default=[\"']?([^\"'\n;]*)", text)
    values = {_expand(value.strip(), environment) for value in said if "next_entry" not in value}
    values = values or {"0"}
    return values.pop() if len(values) == 1 else None


def _expand(value: str, environment: dict[str, str]) -> str:
    """A default that is a variable of grubenv(1) as that has it; without one, the first entry."""
    variable = re.fullmatch(r"\$\{?(\w+)\}?", value)
    if variable:
        return environment.get(variable[1], "") or "0"
    return value or "0"


def _descend(menu: _Node, chosen: str) -> _Node | None:
    """The entry of this title, identifier or number, through submenus by ``>``."""
    node = menu
    for part in chosen.split(">"):
        found = [
            child
            for number, child in enumerate(node.children)
            if part.strip() in (str(number), child.title, child.identifier)
        ]
        if not found:
            return None
        node = found[0]
    return node if node.is_entry else None


def _legacy_menu(_reader: GuestReader, path: PurePosixPath, text: str) -> BootMenu:
    """GRUB 0.9x's; its default is a number, or ``saved``, which is kept outside any file."""
    entries: list[BootEntry] = []
    default = "0"
    for line in _in_force(text):
        keyword, value = _keyword(line)
        if keyword == "title":
            entries.append(BootEntry(title=printable(value), init=None, name=str(len(entries))))
        elif keyword == "default" and not entries:
            default = value
        elif keyword in ("kernel", "module") and entries and (init := init_option(value)):
            entries[-1] = replace(entries[-1], init=init)
    return BootMenu(path=path, default=_named(entries, default), entries=tuple(entries))


def _keyword(line: str) -> tuple[str, str]:
    """The first word, and what follows it behind blanks or an equals sign."""
    match = re.match(r"(\w+)[\s=]*(.*)", line)
    return (match[1].lower(), match[2]) if match else ("", "")


def _named(entries: Sequence[BootEntry], chosen: str) -> BootEntry | None:
    return next((entry for entry in entries if chosen in (entry.name, entry.title)), None)


def _syslinux_menu(_reader: GuestReader, path: PurePosixPath, text: str) -> BootMenu:
    """Labels with their APPEND, or the one above all labels; without labels it is one entry."""
    entries: list[BootEntry] = []
    marked: BootEntry | None = None
    default, common = "", ""
    for line in _in_force(text):
        keyword, value = _keyword(line)
        if keyword == "label":
            title = printable(value)
            entries.append(BootEntry(title=title, init=init_option(common), name=title))
        elif keyword in ("append", "kernel", "linux"):
            if not entries:
                common += f" {value}"
            elif keyword == "append" or init_option(value):
                entries[-1] = replace(entries[-1], init=init_option(value))
        elif keyword in ("default", "ontimeout") and not entries:
            default = value.split()[0] if value else ""
        elif keyword == "menu" and value.lower().startswith("default") and entries:
            marked = entries[-1]
    if not entries and common:
        entries = [BootEntry(title="", init=init_option(common))]
    if marked:  # what came behind its mark is in it too
        marked = _named(entries, marked.name)
    first = entries[0] if entries else None  # a menu's own program as the default shows the first
    return BootMenu(
        path=path, default=marked or _named(entries, default) or first, entries=tuple(entries)
    )


def _loader_menu(reader: GuestReader, folder: PurePosixPath) -> BootMenu | None:
    """The Boot Loader Specification's entries, as GRUB (by grubenv) or systemd-boot choose."""
    environment: dict[str, str] = {}
    place = folder / "entries"
    names = [name for name in reader.list_directory(place) if name.endswith(".conf")]
    if not names:
        return None
    for grub in ("grub2", "grub"):
        environment |= _settings(_text(reader, BOOT / grub / "grubenv"))
    entries = []
    for name in names[:ENTRY_LIMIT]:
        lines = [_keyword(line) for line in _in_force(_text(reader, place / name))]
        if not {"linux", "options"} & {keyword for keyword, _ in lines}:
            continue  # another program: a memory test, a shell of the firmware
        options = " ".join(value for keyword, value in lines if keyword == "options")
        options = options.replace("$kernelopts", environment.get("kernelopts", ""))
        title = next((value for keyword, value in lines if keyword == "title"), name)
        entry = BootEntry(
            title=printable(title), init=init_option(options), name=name.removesuffix(".conf")
        )
        entries.append(entry)
    pattern = _settings(_text(reader, folder / "loader.conf")).get("default", "")
    chosen = [
        entry
        for entry in entries
        if fnmatch.fnmatchcase(f"{entry.name}.conf", pattern)
        or environment.get("saved_entry") in (entry.name, entry.title)
    ]
    return BootMenu(
        path=place, default=chosen[0] if len(chosen) == 1 else None, entries=tuple(entries)
    )


def _source_menu(reader: GuestReader, path: PurePosixPath) -> BootMenu | None:
    """What the next menu will be made from, as a menu of one entry."""
    text = _text(reader, path)
    if not text:
        return None
    lines = _in_force(text)
    if path.name == "grub":
        lines = [
            value for keyword, value in map(_keyword, lines) if "CMDLINE_LINUX" in keyword.upper()
        ]
    entry = BootEntry(title="", init=init_option(" ".join(lines)))
    return BootMenu(path=path, default=entry, entries=(entry,))
