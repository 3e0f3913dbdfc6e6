"""What a recipe says, read from ``recipe.toml`` and checked.

Every key is checked and an unknown one is refused: a misspelt key that is
silently ignored costs its author an evening.
"""

from __future__ import annotations

import hashlib
import re
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.data import data_directory
from vmprovision.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RECIPE_FILE = "recipe.toml"
FILES = "files"
# Part of every image's key: raise it when the same recipe gives another image.
BUILDER_VERSION = 1

ARCHITECTURES = ("amd64", "arm64", "i386")
VARIANTS = ("extract", "custom", "essential", "apt", "minbase", "important", "standard")
PARTITION_TABLES = ("mbr", "gpt", "none")
FILESYSTEMS = ("ext2", "ext3", "ext4")
BOOTLOADERS = ("extlinux", "none")
SMALLEST_DISK_MB = 32
LARGEST_DISK_MB = 1 << 20

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:-]*")
_FEATURE = re.compile(r"\^?[a-z0-9_]+")
_GUEST_PATH = re.compile(r"/[^\0\n]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLayout:
    """The disk of a guest image: one root filesystem.

    Attributes:
        size_mb: size of the disk as the guest sees it, in MiB.
        partition_table: "mbr", "gpt", or "none": the whole disk is the filesystem.
        filesystem: "ext2", "ext3" or "ext4".
        features: filesystem features as ``mke2fs -O`` has them, "^" takes one away.
        uuid: the filesystem's UUID.
        bootloader: "extlinux" (BIOS, from an MBR partition table), or "none".
        command_line: the kernel's; with "none" for whoever loads the kernel.
    """

    size_mb: int
    partition_table: str
    filesystem: str
    features: tuple[str, ...]
    uuid: str
    bootloader: str
    command_line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one guest image is made.

    Attributes:
        name: the name of its folder.
        folder: where its files stand on this host.
        description: one line for a list.
        architecture: Debian's name of it.
        suite: the Debian release, by code name.
        variant: mmdebstrap's package set; "extract" unpacks without installing.
        packages: what is added to the variant.
        leave_out: dpkg's path-exclude patterns.
        keep: dpkg's path-include patterns, exceptions to ``leave_out``.
        shell: the guest's program, with arguments, that reads ``customise``.
        customise: a script that runs in the guest's root after packages and files.
        remove: guest paths that are removed at the very end.
        disk: the disk that all this is put on.
    """

    name: str
    folder: Path
    description: str
    architecture: str
    suite: str
    variant: str
    packages: tuple[str, ...]
    leave_out: tuple[str, ...]
    keep: tuple[str, ...]
    shell: str
    customise: str
    remove: tuple[str, ...]
    disk: DiskLayout

    def files(self) -> list[Path]:
        """The regular files of the recipe's ``files/`` tree, sorted."""
        return sorted(path for path in (self.folder / FILES).rglob("*") if path.is_file())

    def key(self) -> str:
        """A short hash of all that decides what the image holds, but for the packages' versions."""
        digest = hashlib.sha256(str(BUILDER_VERSION).encode())
        for path in [self.folder / RECIPE_FILE, *self.files()]:
            for part in (path.relative_to(self.folder).as_posix().encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
        return digest.hexdigest()[:16]


def list_recipes(folder: Path | None = None) -> list[Recipe]:
    """All recipes, sorted by name.

    Args:
        folder: where to look; else the recipes that ship with vmprovision.

    Raises:
        RecipeError: one of them is wrong.
    """
    root = folder or data_directory("images")
    return [parse_recipe(path.parent) for path in sorted(root.glob(f"*/{RECIPE_FILE}"))]


def find_recipe(name: str, folder: Path | None = None) -> Recipe:
    """The recipe of this name.

    Raises:
        RecipeError: there is none, or it is wrong.
    """
    root = folder or data_directory("images")
    if _NAME.fullmatch(name) and (root / name / RECIPE_FILE).is_file():
        return parse_recipe(root / name)
    known = ", ".join(sorted(path.parent.name for path in root.glob(f"*/{RECIPE_FILE}")))
    raise RecipeError(f"there is no image recipe named {name}", hint=f"there are: {known}")


def parse_recipe(folder: Path) -> Recipe:
    """The recipe that stands in a folder.

    Raises:
        RecipeError: it cannot be read, lacks a key, has an unknown one, or holds a
            value that makes no sense; the message names the file and the key.
    """
    path = folder / RECIPE_FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise RecipeError(f"{path}: {exc}") from exc
    if not _NAME.fullmatch(folder.name):
        raise RecipeError(f"{path}: a recipe's folder is named in small letters, digits, . and -")
    table = _Table(path, content, "")
    recipe = Recipe(
        name=folder.name,
        folder=folder,
        description=table.text("description"),
        architecture=table.choice("architecture", ARCHITECTURES),
        suite=table.matching("suite", _NAME),
        variant=table.choice("variant", VARIANTS),
        packages=table.texts("packages", _PACKAGE),
        leave_out=table.texts("leave_out", _GUEST_PATH),
        keep=table.texts("keep", _GUEST_PATH),
        shell=table.text("shell", default="/bin/sh"),
        customise=table.text("customise", default=""),
        remove=table.texts("remove", _GUEST_PATH),
        disk=_parse_disk(_Table(path, table.table("disk"), "disk.")),
    )
    table.refuse_unknown()
    _refuse_links(recipe)
    return recipe


def _parse_disk(table: _Table) -> DiskLayout:
    disk = DiskLayout(
        size_mb=table.number("size_mb", SMALLEST_DISK_MB, LARGEST_DISK_MB),
        partition_table=table.choice("partition_table", PARTITION_TABLES),
        filesystem=table.choice("filesystem", FILESYSTEMS),
        features=table.texts("features", _FEATURE),
        uuid=table.uuid("uuid"),
        bootloader=table.choice("bootloader", BOOTLOADERS),
        command_line=table.text("command_line"),
    )
    table.refuse_unknown()
    if "\n" in disk.command_line:
        raise table.wrong("command_line", "must be one line")
    if disk.bootloader == "extlinux":
        if disk.partition_table != "mbr":
            raise table.wrong("bootloader", 'extlinux needs partition_table = "mbr"')
        if disk.filesystem == "ext4" and not {"^64bit", "^metadata_csum"} <= set(disk.features):
            raise table.wrong(
                "features", 'extlinux cannot read ext4 without "^64bit" and "^metadata_csum"'
            )
    return disk


def _refuse_links(recipe: Recipe) -> None:
    """Refuse what a wheel cannot carry: it would silently become a copy of the target."""
    for path in (recipe.folder / FILES).rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RecipeError(
                f"{path} is not a regular file", hint="make links and devices in `customise`"
            )


class _Table:
    """One TOML table that is taken apart key by key, so that what is left is unknown."""

    def __init__(self, path: Path, content: Mapping[str, Any], prefix: str) -> None:
        self._path = path
        self._left = dict(content)
        self._prefix = prefix

    def wrong(self, key: str, why: str) -> RecipeError:
        """The error for one key."""
        return RecipeError(f"{self._path}: {self._prefix}{key} {why}")

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._left.pop(key, default)
        if value is None:
            raise self.wrong(key, "is missing")
        if not isinstance(value, str) or (not value.strip() and default is None):
            raise self.wrong(key, "must be a text")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise self.wrong(key, f"cannot be {value!r}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.wrong(key, f"is {value!r} and must be one of {', '.join(choices)}")
        return value

    def uuid(self, key: str) -> str:
        value = self.text(key)
        try:
            return str(uuid.UUID(value))
        except ValueError:
            raise self.wrong(key, f"is {value!r}, which is not a UUID") from None

    def texts(self, key: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
        values = self._left.pop(key, [])
        if not isinstance(values, list):
            raise self.wrong(key, "must be a list of texts")
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise self.wrong(key, f"cannot hold {value!r}")
        return tuple(values)

    def number(self, key: str, least: int, most: int) -> int:
        value = self._left.pop(key, None)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"must be a whole number from {least} to {most}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self._left.pop(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, "must be a table")
        return value

    def refuse_unknown(self) -> None:
        for key in sorted(self._left):
            raise self.wrong(key, "is no key of a recipe")
