"""Find what a GRUB menu starts, by following its script as GRUB does, without running anything.

If a condition is unknown offline, both branches are followed, and a variable has every
value that it may have. Files that GRUB would load are read too; if one cannot be read,
the menu has a doubt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import TYPE_CHECKING

from vmprovision.inspection.bootmenu.conditions import holds
from vmprovision.inspection.bootmenu.files import (
    ENTRY_LIMIT,
    BootMenu,
    NotUnderstoodError,
    settings,
    shown,
)
from vmprovision.inspection.bootmenu.grubentries import (
    FILE_DEPTH,
    UNKNOWN,
    Node,
    Values,
    boot_entry,
    find_default,
    find_leaves,
)
from vmprovision.inspection.bootmenu.grubscript import (
    Choice,
    Command,
    Function,
    Loop,
    Variable,
    literal,
    parse_script,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import PurePosixPath

    from vmprovision.inspection.bootmenu.files import MenuFiles
    from vmprovision.inspection.bootmenu.grubscript import Statement, Word

STEP_WORK = 200  # cost of a statement, in characters
VARIABLES_LIMIT = 500
VALUES_LIMIT = 8
VALUE_LIMIT = 16 << 10
_STARTS_KERNEL = re.compile(r"linux|module|kernel|xen_module")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
# their input has another form, or exists only at boot
_NOT_FOLLOWED = (
    "extract_entries_source",
    "extract_entries_configfile",
    "extract_legacy_entries_source",
    "extract_legacy_entries_configfile",
    "legacy_configfile",
    "legacy_source",
    "syslinux_configfile",
    "syslinux_source",
    "extract_syslinux_entries_source",
    "extract_syslinux_entries_configfile",
)
_ASKS_MACHINE = ("read", "getenv", "inb", "inw", "inl", "read_byte", "read_word", "read_dword")
_TAKES_VALUE = ("--class", "--users", "--hotkey", "--source")

Environment = dict[str, Values]


def grub_menu(files: MenuFiles, path: PurePosixPath, depth: int = 0) -> BootMenu | None:
    """Return GRUB's menu at a path, or None if there is none.

    Raises:
        NotUnderstoodError: the script is too large, too long or nested too deeply.
    """
    if not files.text(path):
        return None
    run = _Run(files=files, path=path, depth=depth)
    root = Node()
    run.follow(run.parsed(path), root)
    if root.instead:
        return root.instead
    run.fill(root)
    entries = [(node, boot_entry(node)) for node in find_leaves(root)]
    if root.kernels:  # the script boots without a menu
        entries.insert(0, (root, boot_entry(root)))
    unread = next(iter(root.doubts), "")
    if len(entries) > ENTRY_LIMIT:
        unread = f"{path} has more than {ENTRY_LIMIT} entries"
    node = None if root.kernels and len(entries) > 1 else find_default(root, run.values("default"))
    default = next((entry for leaf, entry in entries if leaf is node), None)
    menu = tuple(entry for _, entry in entries[:ENTRY_LIMIT])
    return BootMenu(path=path, default=default, entries=menu, unread=unread)


@dataclass(slots=True, kw_only=True)
class _Run:
    """The state of a script while it is followed."""

    files: MenuFiles
    path: PurePosixPath
    depth: int
    environment: Environment = field(default_factory=dict)
    functions: dict[str, tuple[Statement, ...]] = field(default_factory=dict)
    nesting: int = 0
    unsure: int = 0

    def __post_init__(self) -> None:
        """Set the variables that GRUB itself sets, and those of grubenv."""
        folder = str(self.path.parent)
        self.environment |= {
            "prefix": (folder,),
            "config_directory": (folder,),
            "menuentry_id_option": ("--id",),
            "grub_platform": ("pc", "efi"),
            "grub_cpu": ("i386", "x86_64", "arm64"),
            **{f"feature_{name}": ("y",) for name in _FEATURES},
        }
        self.load_environment(self.path.parent / "grubenv")

    def parsed(self, path: PurePosixPath) -> Sequence[Statement]:
        """Return the statements of a file."""
        text = self.files.text(path)
        self.files.spend(len(text))
        return parse_script(text)

    def load_environment(self, path: PurePosixPath) -> None:
        """Load the variables of a grubenv, except a choice for the next boot only."""
        for name, value in settings(self.files.text(path)).items():
            if name != "next_entry":
                self.set(name, (value,))

    def values(self, name: str) -> Values:
        """Return the values that a variable may have."""
        return self.environment.get(name, ("",))

    def set(self, name: str, values: Values) -> None:
        """Set a variable to one of these values."""
        if name not in self.environment and len(self.environment) >= VARIABLES_LIMIT:
            raise NotUnderstoodError(f"{self.path} has more than {VARIABLES_LIMIT} variables")
        values = tuple(dict.fromkeys(value[:VALUE_LIMIT] for value in values))
        self.environment[name] = values if len(values) <= VALUES_LIMIT else (UNKNOWN,)

    def expand(self, word: Word) -> Values:
        """Return what a word may expand to."""
        parts = [self.values(part.name) if isinstance(part, Variable) else (part,) for part in word]
        count = 1
        for values in parts:
            count *= len(values)
            if count > VALUES_LIMIT:
                return (UNKNOWN,)
        self.files.spend(count * sum(len(max(values, key=len)) + 1 for values in parts))
        return tuple(dict.fromkeys("".join(chosen)[:VALUE_LIMIT] for chosen in product(*parts)))

    def follow(self, statements: Sequence[Statement], node: Node) -> None:
        """Follow statements that fill a menu or an entry."""
        self.nesting += 1
        if self.nesting > 4 * FILE_DEPTH:
            raise NotUnderstoodError(f"{self.path} calls itself")
        for statement in statements:
            self.files.spend(STEP_WORK)
            if node.instead:
                break
            if isinstance(statement, Command):
                self._command(statement, node)
            elif isinstance(statement, Choice):
                self._choice(statement, node)
            elif isinstance(statement, Function):
                self.functions[statement.name] = statement.body
            else:
                self._loop(statement, node)
        self.nesting -= 1

    def fill(self, menu: Node) -> None:
        """Follow the bodies of a menu's entries and submenus, as if each were chosen."""
        self.nesting += 1
        for node in menu.children:
            before = self._copy()
            for number, argument in enumerate((node.title, *node.arguments), start=1):
                self.set(str(number), (argument,))
            try:
                self.follow(node.body, node)
                if not node.is_entry:
                    self.fill(node)
            finally:
                self.environment = before
        self.nesting -= 1

    def _copy(self) -> Environment:
        self.files.spend(len(self.environment))
        return dict(self.environment)

    def _maybe(self, statements: Sequence[Statement], node: Node) -> None:
        self.unsure += 1
        self.follow(statements, node)
        self.unsure -= 1

    def _choice(self, choice: Choice, node: Node) -> None:
        """Follow the branch that is taken, or all branches that may be."""
        ends: list[Environment] = []
        for condition, body in choice.branches:
            verdict = self._verdict(condition, node)
            if verdict:
                (self._maybe if ends else self.follow)(body, node)
                break
            if verdict is None:
                before = self._copy()
                self._maybe(body, node)
                ends.append(self.environment)
                self.environment = before
        else:
            (self._maybe if ends else self.follow)(choice.otherwise, node)
        for end in ends:
            for name in {*end, *self.environment}:
                self.set(name, (*self.values(name), *end.get(name, ("",))))

    def _verdict(self, condition: Sequence[Statement], node: Node) -> bool | None:
        """Return whether a condition holds, or None if that is unknown."""
        if len(condition) == 1 and isinstance(condition[0], Command):
            words = [self.expand(word) for word in condition[0].words]
            verdict = holds(words, self._is_there)
            if verdict is not None:
                return verdict
        self._maybe(condition, node)
        return None

    def _is_there(self, path: str) -> bool | None:
        """Return whether a file exists, or None if it may be on another disk."""
        device, found = self._find(path)
        return True if found else None if device else False

    def _find(self, path: str) -> tuple[str, PurePosixPath | None]:
        """Return the device that a path names, if any, and the file in the guest."""
        device = ""
        if path.startswith("("):
            device, _, path = path[1:].partition(")")
        return device, self.files.find(path)

    def _loop(self, loop: Loop, node: Node) -> None:
        if loop.variable is None:
            self._maybe(loop.body, node)
            return
        for word in loop.words:
            for value in self.expand(word):
                for each in value.split():
                    self.set(loop.variable, (UNKNOWN if "*" in each else each,))
                    (self._maybe if "*" in each else self.follow)(loop.body, node)

    def _command(self, command: Command, node: Node) -> None:
        first = self.expand(command.words[0]) if command.words else ("",)
        name, words = first[0], command.words[1:]
        if _ASSIGNMENT.match(name):
            self._assign(command.words[0])
        elif name in ("menuentry", "submenu"):
            self._entry(name, words, command.block, node)
        elif command.block is not None:
            self._maybe(command.block, node)
        elif name in self.functions:
            before = {str(n): self.values(str(n)) for n in range(1, 10)}
            for number in range(1, 10):
                given = words[number - 1 : number]
                self.set(str(number), self.expand(given[0]) if given else ("",))
            self.follow(self.functions[name], node)
            self.environment |= before
        elif _STARTS_KERNEL.match(name):
            node.kernels.append((name, [self.expand(word) for word in words]))
        elif handler := _COMMANDS.get(name):
            handler(self, words, node)
        elif name in _NOT_FOLLOWED or UNKNOWN in name or len(first) > 1:
            node.doubts.append(f"{self.path} has a command that is not followed: {shown(name)!r}")
        else:
            self._captures(name, words)

    def _assign(self, word: Word) -> None:
        for value in self.expand(word)[:1]:
            name = value.partition("=")[0]
            self.set(name, tuple(each.partition("=")[2] for each in self.expand(word)))

    def _entry(
        self, kind: str, words: Sequence[Word], block: tuple[Statement, ...] | None, node: Node
    ) -> None:
        if len(node.children) > 4 * ENTRY_LIMIT:
            raise NotUnderstoodError(f"{self.path} has more than {4 * ENTRY_LIMIT} entries")
        identifier, plain = "", []
        given = iter(self.expand(word)[0] for word in words)
        for word in given:
            if word == "--id" or word.startswith("--id="):
                identifier = word[5:] or next(given, "")
            elif word in _TAKES_VALUE:
                next(given, "")
            elif not word.startswith("--"):
                plain.append(word)
        node.children.append(
            Node(
                title=shown(plain[0]) if plain else "",
                identifier=identifier,
                is_entry=kind == "menuentry",
                is_sure=not self.unsure,
                body=block or (),
                arguments=tuple(plain[1:9]),
            )
        )

    def _captures(self, name: str, words: Sequence[Word]) -> None:
        """Set the variable into which a command stores its result, except a searched device."""
        plain = [self.expand(word)[0] for word in words]
        names = [
            value
            for word, following in pairwise([*plain, ""])
            for value in [word[6:] if word.startswith("--set=") else following]
            if word in ("--set", "-s") or word.startswith("--set=")
        ]
        if name in _ASKS_MACHINE:
            names += plain[-1:]
        for each in names:
            variable = each.rpartition(":")[2]
            if variable not in ("", "root") and not variable.startswith("-"):
                self.set(variable, (UNKNOWN,))

    def _set(self, words: Sequence[Word], _node: Node) -> None:
        for word in words[:1]:
            self._assign(word)

    def _unset(self, words: Sequence[Word], _node: Node) -> None:
        for word in words:
            self.environment.pop(literal(word) or "", None)

    def _source(self, words: Sequence[Word], node: Node) -> None:
        """Follow another file's script in place."""
        for path in self.expand(words[0]) if words else ():
            device, found = self._find(path)
            if found is None:
                if device or UNKNOWN in path:
                    node.doubts.append(f"{self.path} loads {shown(path)}, which does not exist")
                continue
            self.follow(self.parsed(found), node)

    def _configfile(self, words: Sequence[Word], node: Node) -> None:
        """Replace this menu by another file's."""
        paths = self.expand(words[0]) if words else ()
        found = self._find(paths[0])[1] if len(paths) == 1 else None
        if self.depth >= FILE_DEPTH:
            raise NotUnderstoodError(f"{self.path} loads too many menus in a row")
        menu = (
            grub_menu(self.files, found, self.depth + 1) if found and found != self.path else None
        )
        if menu is None or self.unsure:
            named = ", ".join(map(shown, paths)) or "another menu"
            node.doubts.append(
                f"{self.path} leads to {named}, which is not here or not always taken"
            )
        else:
            node.instead = menu

    def _load(self, words: Sequence[Word], _node: Node) -> None:
        plain = [self.expand(word)[0] for word in words]
        if "-f" not in plain[:-1] and "--file" not in plain[:-1]:
            self.load_environment(self.path.parent / "grubenv")
            return
        named = next(after for word, after in pairwise(plain) if word in ("-f", "--file"))
        if found := self._find(named)[1]:
            self.load_environment(found)

    def _evaluate(self, words: Sequence[Word], node: Node) -> None:
        text = " ".join(self.expand(word)[0] for word in words)
        self.files.spend(len(text))
        self.follow(parse_script(text), node)


_FEATURES = (
    "all_video_module",
    "chainloader_bpb",
    "default_font_path",
    "menuentry_id",
    "menuentry_options",
    "nativedisk_cmd",
    "ntldr",
    "platform_search_hint",
    "timeout_style",
)
_COMMANDS: Mapping[str, Callable[[_Run, Sequence[Word], Node], None]] = {
    "set": _Run._set,  # noqa: SLF001 -- its own table
    "unset": _Run._unset,  # noqa: SLF001
    "source": _Run._source,  # noqa: SLF001
    ".": _Run._source,  # noqa: SLF001
    "configfile": _Run._configfile,  # noqa: SLF001
    "load_env": _Run._load,  # noqa: SLF001
    "eval": _Run._evaluate,  # noqa: SLF001
}
