"""Boot menus in tables: syslinux(1), lilo.conf(5), GRUB 0.9x, a command line in a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.guest.shelltext import VALUE_LIMIT, parse_assignments
from vmprovision.inspection.bootmenu.files import (
    ENTRY_LIMIT,
    BootEntry,
    BootMenu,
    NotUnderstoodError,
    entry_of,
    init_option,
    keyword,
    lines_in_force,
    shown,
    unit_option,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.inspection.bootmenu.files import MenuFiles

INCLUDE_DEPTH = 16  # syslinux's own limit
GRUB_DEFAULTS = PurePosixPath("/etc/default/grub")
GRUB_DROP_INS = PurePosixPath("/etc/default/grub.d")
DROP_INS_LIMIT = 100


def _named(entries: Sequence[BootEntry], chosen: str) -> BootEntry | None:
    return next((entry for entry in entries if chosen in (entry.name, entry.title)), None)


def _menu(path: PurePosixPath, default: BootEntry | None, entries: Sequence[BootEntry]) -> BootMenu:
    if len(entries) > ENTRY_LIMIT:
        raise NotUnderstoodError(f"{path} has more than {ENTRY_LIMIT} entries")
    return BootMenu(path=path, default=default, entries=tuple(entries))


@dataclass(slots=True)
class _Label:
    """A label of syslinux while it is read: what it starts, and with which options."""

    name: str
    kernel: str = ""
    append: str | None = None
    doubt: str = ""


@dataclass(slots=True)
class _Labels:
    """The content of a syslinux configuration: common options, labels, and the default."""

    common: _Label = field(default_factory=lambda: _Label(name=""))
    labels: list[_Label] = field(default_factory=list)
    default: str = ""
    marked: str = ""

    def take(self, word: str, value: str, path: PurePosixPath) -> None:
        """Process one line."""
        here = self.labels[-1] if self.labels else self.common
        if word == "label":
            self.labels.append(_Label(name=value))
        elif word == "append":
            here.append = value
        elif word in ("kernel", "linux"):
            here.kernel = value
        elif word == "config":
            here.doubt = f"{path} leads to {shown(value)}"
        elif word in ("default", "ontimeout") and not self.labels:
            self.default = value
        elif word == "menu" and value.lower().startswith("default"):
            self.marked = here.name

    def named(self) -> list[_Label]:
        """Return the labels that ``default`` names, which may have several words.

        syslinux compares the first words and takes the first label; U-Boot, which reads
        such files too, compares all of them.
        """
        first = self.default.split()[:1]
        by_word = [label for label in self.labels if first and label.name.split()[:1] == first][:1]
        by_line = [label for label in self.labels if first and label.name == self.default]
        return [*by_word, *(label for label in by_line if label not in by_word)]


def syslinux_menu(files: MenuFiles, path: PurePosixPath) -> BootMenu | None:
    """Return the labels with their APPEND or the common one; a file without labels is one entry."""
    found = _Labels()
    for word, value in _syslinux_lines(files, path):
        found.take(word, value, path)
    labels, common = found.labels, found.common
    first, _, options = found.default.partition(" ")
    named = found.named()
    is_bare = bool(options) or (not labels and bool(common.append or common.kernel))
    if is_bare and not named and not first.endswith((".c32", ".0")):
        # a whole command line, or options without any label
        named = [_Label(name=first, kernel=first or common.kernel)]
        labels += named
    if len(labels) > ENTRY_LIMIT:
        raise NotUnderstoodError(f"{path} has more than {ENTRY_LIMIT} entries")
    entries = [
        _syslinux_entry(label, common, options if label in named else "") for label in labels
    ]
    if found.marked:
        named = [label for label in labels if label.name == found.marked][:1]
    chosen = [entry for label, entry in zip(labels, entries, strict=True) if label in named]
    if len(set(chosen)) > 1:
        return _menu(path, None, entries)
    # if the default is a menu program, its first entry is shown
    return _menu(path, next(iter([*chosen, *entries]), None), entries)


def _syslinux_entry(label: _Label, common: _Label, options: str) -> BootEntry:
    append = label.append if label.append is not None else common.append or ""
    line = f"{label.kernel} {append} {options}"
    title = shown(label.name)
    return entry_of(title, line, name=title, doubt=label.doubt)


def _syslinux_lines(
    files: MenuFiles, path: PurePosixPath, depth: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield keyword and value of each line, with included files in place."""
    text = files.text(path)
    files.spend(len(text))
    for line in lines_in_force(text):
        word, value = keyword(line)
        word = word.lower()
        if word == "menu" and value.lower().startswith("include"):
            word, value = "include", keyword(value)[1]
        taken = value.split()
        if word == "include":
            taken = taken[:1]
        elif word == "ui":  # the menu program, then its configuration files
            taken = taken[1:]
        else:
            yield word, value
            continue
        for name in taken:
            found = files.real_path(path.parent / name) if len(name) < VALUE_LIMIT else None
            found = found or files.find(name)
            if found is None or depth >= INCLUDE_DEPTH:
                raise NotUnderstoodError(f"{path} includes {shown(name)}, which does not exist")
            yield from _syslinux_lines(files, found, depth + 1)


def lilo_menu(files: MenuFiles, path: PurePosixPath) -> BootMenu | None:
    """Return the images of lilo.conf(5); the first is the default unless ``default`` names one.

    LILO itself reads a map that its installer made from this file. The map is assumed
    to be up to date.
    """
    default = common = ""
    sections: list[dict[str, str]] = []
    for line in lines_in_force(files.text(path)):
        word, value = keyword(line)
        word, value = word.lower(), value.strip("\"'")
        if word in ("image", "other"):
            sections.append({"kind": word, "label": PurePosixPath(value).name})
        elif sections:
            sections[-1][word] = value
        elif word == "default":
            default = value
        elif word in ("append", "addappend"):
            common = f"{common} {value}"[:VALUE_LIMIT]
    entries = [
        entry_of(section["label"], _lilo_options(section, common), name=section.get("alias", ""))
        for section in sections[: ENTRY_LIMIT + 1]
        if section["kind"] == "image"
    ]
    chosen = _named(entries, default) if default else next(iter(entries), None)
    if sections and sections[0]["kind"] == "other" and not default:
        chosen = None
    return _menu(path, chosen, entries)


def _lilo_options(section: dict[str, str], common: str) -> str:
    """Return an image's options: ``literal`` alone, else ``append`` or the common one."""
    if "literal" in section:
        return section["literal"]
    return f"{section.get('append', common)} {section.get('addappend', '')}"


def command_line(files: MenuFiles, path: PurePosixPath) -> BootMenu | None:
    """Return the single entry of a file that holds only the kernel's options."""
    lines = lines_in_force(files.text(path))
    if not lines:
        return None
    return _menu(path, *_alone(" ".join(lines)))


def firmware_line(files: MenuFiles, folder: PurePosixPath) -> BootMenu | None:
    """Return what the Raspberry Pi's firmware starts: ``cmdline.txt``, or the file in config.txt.

    Each section of config.txt is for one model of board. The guest's board is unknown,
    so different file names make a doubt.
    """
    names = {
        value
        for word, value in map(keyword, lines_in_force(files.text(folder / "config.txt")))
        if word == "cmdline" and len(value) < VALUE_LIMIT
    }
    menus = [command_line(files, folder / name) for name in sorted(names or {"cmdline.txt"})[:5]]
    found = [menu for menu in menus if menu]
    if not found:
        return None
    entries = [entry for menu in found for entry in menu.entries]
    return _menu(found[0].path, entries[0] if len(found) == 1 else None, entries)


def _alone(options: str) -> tuple[BootEntry, tuple[BootEntry, ...]]:
    entry = entry_of("", options)
    return entry, (entry,)


def grub_defaults(files: MenuFiles) -> BootMenu | None:
    """Return the settings from which GRUB's next menu will be made, as a menu of one entry."""
    names = files.reader.list_directory(GRUB_DROP_INS)
    drop_ins = [GRUB_DROP_INS / name for name in names if name.endswith(".cfg")]
    if len(drop_ins) > DROP_INS_LIMIT:
        raise NotUnderstoodError(f"{GRUB_DROP_INS} holds more than {DROP_INS_LIMIT} files")
    variables: dict[str, str] = {}
    found = None
    for path in (GRUB_DEFAULTS, *drop_ins):
        for name, value in parse_assignments(files.text(path), variables):
            variables[name] = value
            if "CMDLINE_LINUX" in name:
                found = path
    # _RECOVERY is for recovery entries, which are never the default
    options = " ".join(
        variables.get(name, "") for name in ("GRUB_CMDLINE_LINUX", "GRUB_CMDLINE_LINUX_DEFAULT")
    )
    return _menu(found, *_alone(options)) if found else None


def uboot_line(files: MenuFiles, path: PurePosixPath) -> BootMenu | None:
    """Return the kernel options in the environment file that U-Boot's scripts import.

    The script itself is not followed, so the file counts only if it names an init.
    """
    values = [value for _, value in map(keyword, lines_in_force(files.text(path)))]
    telling = [value for value in values if init_option(value) or unit_option(value)]
    return _menu(path, *_alone(" ".join(telling))) if telling else None


def legacy_menu(files: MenuFiles, path: PurePosixPath) -> BootMenu | None:
    """Return the menu of GRUB 0.9x; its default is a number, or ``saved`` outside any file."""
    titles: list[str] = []
    options: list[str] = []
    default = "0"
    doubt = ""
    for line in lines_in_force(files.text(path)):
        word, value = keyword(line)
        word = word.lower()
        if word == "title":
            titles.append(value)
            options.append("")
        elif word == "default" and not titles:
            default = value
        elif word in ("kernel", "module") and titles:
            options[-1] += f" {value}"
        elif word == "configfile":
            doubt = doubt or f"{path} leads to {shown(value)}"
    entries = tuple(
        entry_of(title, line, name=str(number))
        for number, (title, line) in enumerate(zip(titles, options, strict=True))
    )
    chosen = next((entry for entry in entries if entry.name == default), None)
    if len(entries) > ENTRY_LIMIT:
        doubt = f"{path} has more than {ENTRY_LIMIT} entries"
    return BootMenu(path=path, default=chosen, entries=entries[:ENTRY_LIMIT], unread=doubt)
