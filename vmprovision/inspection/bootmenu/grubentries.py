"""The entries of a GRUB menu as a tree, its default entry, and what each entry starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmprovision.inspection.bootmenu.files import BootEntry, entry_of, seal_options
from vmprovision.inspection.bootmenu.rootoptions import RootOptions, root_options

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.inspection.bootmenu.files import BootMenu
    from vmprovision.inspection.bootmenu.grubscript import Statement

FILE_DEPTH = 8
UNKNOWN = "\0"  # in a value: known only on the running machine

Values = tuple[str, ...]


@dataclass(slots=True)
class Node:
    """An entry or a submenu while it is being read.

    Attributes:
        is_sure: False if it exists only under a condition that is unknown offline.
        kernels: each command that loads a kernel, its words with their possible values.
    """

    title: str = ""
    identifier: str = ""
    is_entry: bool = False
    is_sure: bool = True
    body: tuple[Statement, ...] = ()
    arguments: tuple[str, ...] = ()
    children: list[Node] = field(default_factory=list)
    kernels: list[tuple[str, list[Values]]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    instead: BootMenu | None = None


def find_leaves(node: Node) -> list[Node]:
    """Return the entries that start a Linux kernel, in the menu's order."""
    if node.is_entry:
        return [node] if node.kernels or node.instead or node.doubts else []
    return [leaf for child in node.children for leaf in find_leaves(child)]


def boot_entry(node: Node) -> BootEntry:
    """Return what an entry starts, with a doubt if that depends on something unknown."""
    doubt = next(iter(node.doubts), "")
    if node.instead and not node.kernels:
        inner = node.instead
        first = next(iter(inner.may_boot), None)
        same = len({(entry.init, entry.unit) for entry in inner.may_boot}) == 1
        if first is None or not same or inner.doubt:
            doubt = doubt or inner.doubt or f"{inner.path} does not say which of its entries boots"
        return BootEntry(
            title=node.title,
            init=first.init if first else None,
            unit=first.unit if first else None,
            roots=tuple(dict.fromkeys(root for entry in inner.may_boot for root in entry.roots)),
            doubt=doubt,
        )
    started = [_started(words) for _, words in node.kernels]
    kernels = {
        tuple(may) for (name, _), may in zip(node.kernels, started, strict=True) if "linux" in name
    }
    outcomes = list(dict.fromkeys(each for may in started for each in may if any(each)))
    sure = all(len(may) == 1 for may in started) and len(kernels) <= 1 and len(outcomes) <= 1
    if not doubt and not sure:
        doubt = f"what the entry {node.title!r} gives to the kernel depends on the running machine"
    init, unit = outcomes[0] if outcomes else (None, None)
    options = " ".join(value for _, words in node.kernels for values in words for value in values)
    return BootEntry(
        title=node.title,
        init=init,
        unit=unit,
        seals=seal_options(options),
        roots=_roots(node),
        doubt=doubt,
    )


def _roots(node: Node) -> tuple[RootOptions, ...]:
    """Return what the commands that load a kernel may say of the root filesystem."""
    lines = [line for _, words in node.kernels for line in _lines(words)]
    found = [root_options(line) for line in lines]
    return tuple(dict.fromkeys(each for each in found if each != RootOptions("", "")))


def _started(words: list[Values]) -> list[tuple[PurePosixPath | None, str | None]]:
    """Return the possible command lines of these words; none if that is unknown."""
    lines = _lines(words)
    if any(_may_hide(line) for line in lines):
        return []
    found = [entry_of("", line) for line in lines]
    return list(dict.fromkeys((entry.init, entry.unit) for entry in found))


def _lines(words: list[Values]) -> list[str]:
    """Return the possible command lines; if several words vary, each is varied alone."""
    fixed = " ".join(values[0] for values in words if len(values) == 1)
    lines = [f"{fixed} {value}" for values in words if len(values) > 1 for value in values]
    return lines or [fixed]


def _may_hide(line: str) -> bool:
    """Return whether an option after the kernel's name is unknown, or names an unknown init."""
    return any(
        word.startswith((UNKNOWN, "init=", "systemd.unit=")) and UNKNOWN in word
        for word in line.split(" ")[1:]
    )


def find_default(root: Node, wanted: Values) -> Node | None:
    """Return the entry that ``default`` selects, or None if that is ambiguous or unknown."""
    found = {id(node): node for value in wanted for node in [_descend(root, value or "0")]}
    return next(iter(found.values())) if len(found) == 1 else None


def _descend(root: Node, chosen: str) -> Node | None:
    """Return the entry with this title, identifier or number; ``>`` leads into submenus."""
    node = root
    parts = chosen.replace(">>", UNKNOWN).split(">")
    if UNKNOWN in chosen or len(parts) > FILE_DEPTH:
        return None
    for part in (each.replace(UNKNOWN, ">").strip() for each in parts):
        index = next(
            (
                number
                for number, child in enumerate(node.children)
                if part in (str(number), child.title, child.identifier)
            ),
            None,
        )
        if index is None:
            return None
        counted = part == str(index)
        passed = node.children[: index + 1] if counted else node.children[index : index + 1]
        if not all(child.is_sure for child in passed):
            return None
        node = node.children[index]
    return node if node.is_entry else None
