"""Read and check a recipe: ``recipe.toml``.

Every key is checked.  An unknown key is an error, because a misspelt key would
otherwise be ignored silently.

A recipe may extend another one.  Its values replace those of the other, but lists are
appended, and tables are merged key by key.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.errors import RecipeError
from vmprovision.host.data import data_directory
from vmprovision.recipe.table import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RECIPE_FILE = "recipe.toml"
FILES = "files"
# Part of every image's key: increase it when the same recipe gives a different image.
BUILDER_VERSION = 2
# Keys of a disk that came later count only if they are given: other images keep their key.
ADDED_KEYS = ("subvolumes", "volume_group", "boot_mb")

ARCHITECTURES = ("amd64", "arm64", "armhf", "i386", "ppc64el", "riscv64", "s390x")
VARIANTS = ("extract", "custom", "essential", "apt", "minbase", "important", "standard")
PARTITION_TABLES = ("mbr", "gpt", "none")
FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
BOOTLOADERS = ("extlinux", "grub", "none")
SMALLEST_DISK_MB = 32
LARGEST_DISK_MB = 1 << 20
# file name suffix -> the compression's name in libguestfs's tar_in
COMPRESSIONS = {".tar": None, ".tar.gz": "gzip", ".tar.bz2": "bzip2", ".tar.xz": "xz"}

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
# a leading "_" marks a recipe that others extend and that is not an image itself
_BASE = re.compile(r"_?[a-z0-9][a-z0-9.-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:-]*")
_KERNEL = re.compile(rf"[a-z0-9][a-z0-9+.-]*(:({'|'.join(ARCHITECTURES)}))?")
_FEATURE = re.compile(r"\^?[a-z0-9_]+")
_GUEST_PATH = re.compile(r"/[^\0\n]*")
_GROUP = re.compile(r"[a-z0-9][a-z0-9_]*")
_SUBVOLUME = re.compile(r"[A-Za-z0-9@._][A-Za-z0-9@._/-]*:/[A-Za-z0-9._/-]*")
_TARBALL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.tar(\.(gz|bz2|xz))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLayout:
    """The disk of a guest image: a root filesystem, and what boots it.

    Attributes:
        size_mb: size of the disk as the guest sees it, in MiB.
        partition_table: "mbr", "gpt", or "none": the whole disk is the filesystem.
        filesystem: the root's: "ext2", "ext3", "ext4", "xfs" or "btrfs".
        features: of an ext2, ext3 or ext4 root, as for ``mke2fs -O``; "^" removes one, and the
            last word counts.
        uuid: the root filesystem's UUID.
        subvolumes: "NAME:PLACE" for each subvolume of a btrfs root, parents first.
        volume_group: the LVM group whose volume "root" has the root; empty without LVM.
        boot_mb: size of an ext4 of its own for ``/boot``, with the label BOOT; 0 without.
        bootloader: "extlinux" (BIOS, from an MBR partition table), "grub" (BIOS and UEFI,
            from a GPT, installed by the guest's own packages), or "none".
        command_line: the kernel's; with "grub", without the root, which its menu adds; with
            "none", for the program that loads the kernel.
    """

    size_mb: int
    partition_table: str
    filesystem: str
    features: tuple[str, ...]
    uuid: str
    subvolumes: tuple[str, ...]
    volume_group: str
    boot_mb: int
    bootloader: str
    command_line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tarball:
    """A root filesystem archive built elsewhere.

    Attributes:
        name: the file's name; its suffix determines the compression.
        sha256: the file's hash.
    """

    name: str
    sha256: str

    @property
    def compression(self) -> str | None:
        """The compression, as libguestfs names it."""
        return next(how for end, how in COMPRESSIONS.items() if self.name.endswith(end))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to build one guest image.

    Attributes:
        name: the name of its folder.
        folders: the folders with its files: those of the recipes that it extends, the
            most basic one first, then its own.
        description: one line for a list.
        architecture: Debian's name of it.
        suite: the Debian release's code name.
        updates: whether packages may come from its updates and security archives;
            for an unsupported release, files disappear from those archives.
        variant: mmdebstrap's package set; "extract" unpacks without installing.
        kernel: the package of its kernel, followed by ":ARCHITECTURE" if that differs from
            the guest's; empty if it has none.
        packages: packages beside those of the variant and the kernel's.
        leave_out: dpkg's path-exclude patterns.
        keep: dpkg's path-include patterns, exceptions to ``leave_out``.
        shell: the guest's program, with arguments, that reads ``customise``.
        customise: a script that runs in the guest's root after packages and files.
        remove: guest paths to remove at the very end.
        tarball: a root filesystem below all of this; nothing in it is executed.
        disk: the disk that all of this is copied to.
    """

    name: str
    folders: tuple[Path, ...]
    description: str
    architecture: str
    suite: str
    updates: bool
    variant: str
    kernel: str
    packages: tuple[str, ...]
    leave_out: tuple[str, ...]
    keep: tuple[str, ...]
    shell: str
    customise: str
    remove: tuple[str, ...]
    tarball: Tarball | None
    disk: DiskLayout

    @property
    def architectures(self) -> tuple[str, ...]:
        """The guest's architecture, and its kernel's if that differs."""
        kernel = self.kernel.partition(":")[2] or self.architecture
        return tuple(dict.fromkeys((self.architecture, kernel)))

    def files(self) -> dict[str, Path]:
        """Return the regular files of the ``files/`` trees, sorted by their path in the guest.

        A recipe's own file replaces an inherited file with the same path.
        """
        found = {
            path.relative_to(folder / FILES).as_posix(): path
            for folder in self.folders
            for path in (folder / FILES).rglob("*")
            if path.is_file()
        }
        return dict(sorted(found.items()))

    def key(self) -> str:
        """Return a short hash of all that determines the image, except the packages' versions."""
        said = asdict(self)
        for words in ("name", "folders", "description"):
            del said[words]
        for word in ADDED_KEYS:
            if not said["disk"][word]:
                del said["disk"][word]
        digest = hashlib.sha256(json.dumps([BUILDER_VERSION, said]).encode())
        for place, path in self.files().items():
            for part in (place.encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
        return digest.hexdigest()[:16]


def list_recipes(folder: Path | None = None) -> list[Recipe]:
    """Return all recipes of images, sorted by name.

    Args:
        folder: the folder of the recipes; by default those that ship with vmprovision.

    Raises:
        RecipeError: one of them is invalid.
    """
    root = folder or data_directory("images")
    return [parse_recipe(root / name) for name in _names(root)]


def find_recipe(name: str, folder: Path | None = None) -> Recipe:
    """Return the recipe of this name.

    Raises:
        RecipeError: no recipe has this name, or it is invalid.
    """
    root = folder or data_directory("images")
    names = _names(root)
    if name in names:
        return parse_recipe(root / name)
    raise RecipeError(
        f"there is no image recipe named {name}", hint=f"there are: {', '.join(names)}"
    )


def _names(root: Path) -> list[str]:
    folders = (path.parent.name for path in root.glob(f"*/{RECIPE_FILE}"))
    return sorted(name for name in folders if not name.startswith("_"))


def parse_recipe(folder: Path) -> Recipe:
    """Return the recipe in a folder, together with what it inherits.

    Raises:
        RecipeError: it cannot be read, lacks a key, has an unknown one, or has an
            invalid value; the message names the file and the key.
    """
    path = folder / RECIPE_FILE
    content, folders = _read_with_bases(folder, ())
    if not _BASE.fullmatch(folder.name):
        raise RecipeError(f"{path}: the folder's name may have only small letters, digits, . and -")
    table = Table(path, content, "")
    recipe = Recipe(
        name=folder.name,
        folders=folders,
        description=table.text("description"),
        architecture=table.choice("architecture", ARCHITECTURES),
        suite=table.matching("suite", _NAME),
        updates=table.truth("updates", default=True),
        variant=table.choice("variant", VARIANTS),
        kernel=table.optional("kernel", _KERNEL),
        packages=table.texts("packages", _PACKAGE),
        leave_out=table.texts("leave_out", _GUEST_PATH),
        keep=table.texts("keep", _GUEST_PATH),
        shell=table.text("shell", default="/bin/sh"),
        customise=table.text("customise", default=""),
        remove=table.texts("remove", _GUEST_PATH),
        tarball=_parse_tarball(path, table),
        disk=_parse_disk(Table(path, table.table("disk"), "disk.")),
    )
    table.refuse_unknown()
    for place in folders:
        _refuse_links(place)
    return recipe


def _read_with_bases(
    folder: Path, below: tuple[Path, ...]
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return a recipe's merged content, and the folders of all merged recipes, its own last.

    Args:
        folder: the recipe's.
        below: the folders of the recipes that extend it.
    """
    path = folder / RECIPE_FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise RecipeError(f"{path}: {exc}") from exc
    name = content.pop("extends", None)
    if name is None:
        return content, (folder,)
    if not isinstance(name, str) or not _BASE.fullmatch(name):
        raise RecipeError(f"{path}: extends cannot be {name!r}")
    base = folder.with_name(name)
    if base in (folder, *below):
        raise RecipeError(f"{path}: extends {name!r}, which extends this one")
    inherited, folders = _read_with_bases(base, (folder, *below))
    return _merged(inherited, content), (*folders, folder)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        inherited = base.get(key)
        if isinstance(inherited, list) and isinstance(value, list):
            merged[key] = [*inherited, *value]
        elif isinstance(inherited, dict) and isinstance(value, dict):
            merged[key] = _merged(inherited, value)
        else:
            merged[key] = value
    return merged


def _parse_tarball(path: Path, table: Table) -> Tarball | None:
    if "tarball" not in table:
        return None
    inner = Table(path, table.table("tarball"), "tarball.")
    tarball = Tarball(
        name=inner.matching("name", _TARBALL), sha256=inner.matching("sha256", _SHA256)
    )
    inner.refuse_unknown()
    return tarball


def _parse_disk(table: Table) -> DiskLayout:
    size = table.number("size_mb", SMALLEST_DISK_MB, LARGEST_DISK_MB)
    disk = DiskLayout(
        size_mb=size,
        partition_table=table.choice("partition_table", PARTITION_TABLES),
        filesystem=table.choice("filesystem", FILESYSTEMS),
        features=table.texts("features", _FEATURE),
        uuid=table.uuid("uuid"),
        subvolumes=table.texts("subvolumes", _SUBVOLUME),
        volume_group=table.optional("volume_group", _GROUP),
        boot_mb=table.number("boot_mb", 0, size, default=0),
        bootloader=table.choice("bootloader", BOOTLOADERS),
        command_line=table.text("command_line"),
    )
    table.refuse_unknown()
    if "\n" in disk.command_line:
        raise table.wrong("command_line", "must be one line")
    _check_disk(disk, table)
    return disk


def _check_disk(disk: DiskLayout, table: Table) -> None:
    """Raise an error for keys of a disk that exclude each other."""
    if disk.bootloader == "extlinux":
        if disk.partition_table != "mbr":
            raise table.wrong("bootloader", 'extlinux needs partition_table = "mbr"')
        if disk.filesystem == "ext4" and not {"^64bit", "^metadata_csum"} <= set(disk.features):
            raise table.wrong(
                "features", 'extlinux cannot read ext4 without "^64bit" and "^metadata_csum"'
            )
    elif disk.bootloader == "grub" and disk.partition_table != "gpt":
        raise table.wrong("bootloader", 'grub needs partition_table = "gpt"')
    if disk.bootloader != "grub" and (disk.boot_mb or disk.volume_group):
        raise table.wrong("bootloader", 'must be "grub" with boot_mb or volume_group')
    if bool(disk.subvolumes) != (disk.filesystem == "btrfs"):
        raise table.wrong("subvolumes", "must be given for btrfs, and for nothing else")
    places = [each.partition(":")[2] for each in disk.subvolumes]
    if places and "/" not in places:
        raise table.wrong("subvolumes", "must name the one of /")


def _refuse_links(folder: Path) -> None:
    """Refuse links, which a wheel would silently replace by copies of their targets."""
    for path in (folder / FILES).rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RecipeError(
                f"{path} is not a regular file", hint="create links and devices in `customise`"
            )
