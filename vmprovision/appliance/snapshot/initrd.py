"""The initial RAM disk with which an appliance boots before it is saved.

It has our process 1, the interpreter that runs it, and the modules of the kernel that the
machine and its guests need. With it the kernel starts while supermin(1) still makes the
appliance's root. Its format is cpio's "newc", as in the kernel's documentation of the
initramfs buffer format.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
from typing import TYPE_CHECKING

from vmprovision.host.command import run
from vmprovision.host.workspace import workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

# The devices that are there, then the filesystems that guests mostly have.
WANTED = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console"),
    *("crc32c", "ext4", "xfs", "btrfs", "vfat"),
    *("nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8", "dm_mod"),
)
UNPACK_SECONDS = 60.0
EXECUTABLE = stat.S_IFREG | 0o755
FOLDER = stat.S_IFDIR | 0o755
_END = "TRAILER!!!"


def initrd_content(
    modules: Path, files: Mapping[str, bytes], wanted: Iterable[str] = WANTED
) -> bytes:
    """Return an initial RAM disk.

    Args:
        modules: the kernel's modules, a folder of ``/lib/modules``.
        files: its programs by their names in the root directory.
        wanted: names or aliases of the modules that it has, with all that they need.

    Raises:
        OSError: a module cannot be read.
        CommandError: a module cannot be unpacked.
    """
    entries = [(name, EXECUTABLE, content) for name, content in files.items()]
    entries.append(("modules", FOLDER, b""))
    for number, path in enumerate(load_order(modules, wanted)):
        name, content = _unpacked(modules / path)
        entries.append((f"modules/{number:03}-{name}", EXECUTABLE, content))
    return b"".join(_cpio([*entries, (_END, 0, b"")]))


def load_order(modules: Path, wanted: Iterable[str]) -> list[str]:
    """Return the files of modules and of all that they need, each after what it needs.

    A module that is built into the kernel, or that this kernel does not have, has no file.

    Args:
        modules: the kernel's modules, with the tables of depmod(8).
        wanted: names or aliases of modules.

    Returns:
        Paths below ``modules``.

    Raises:
        OSError: a table cannot be read.
    """
    files, needs = _dependencies((modules / "modules.dep").read_text(encoding="utf-8"))
    soft = dict(_soft_dependencies((modules / "modules.softdep").read_text(encoding="utf-8")))
    aliases = _aliases((modules / "modules.alias").read_text(encoding="utf-8"))
    order: dict[str, None] = {}
    begun: set[str] = set()

    def add(name: str) -> None:
        if name in begun:
            return
        begun.add(name)
        for other in (*soft.get(name, ()), *needs.get(name, ()), *aliases.get(name, ())):
            add(other)
        if name in files:
            order[files[name]] = None

    for name in wanted:
        add(name)
    return list(order)


def _dependencies(table: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the file of each module, and the modules that it needs."""
    files: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    for line in table.splitlines():
        path, _, needed = line.partition(":")
        files[_name_of(path)] = path
        needs[_name_of(path)] = [_name_of(other) for other in needed.split()]
    return files, needs


def _soft_dependencies(table: str) -> Iterator[tuple[str, list[str]]]:
    """Yield modules, and what is to be loaded before each although it could do without."""
    for line in table.splitlines():
        words = line.split()
        if words[:1] == ["softdep"] and "pre:" in words:
            before = " ".join(words[2:]).partition("pre:")[2].partition("post:")[0]
            yield _plain(words[1]), [_plain(word) for word in before.split()]


def _aliases(table: str) -> dict[str, list[str]]:
    """Return the modules of each alias."""
    found: dict[str, list[str]] = {}
    for line in table.splitlines():
        words = line.split()
        if words[:1] == ["alias"]:
            found.setdefault(_plain(words[1]), []).append(_plain(words[-1]))
    return found


def _name_of(path: str) -> str:
    return _plain(path.rpartition("/")[2].partition(".")[0])


def _plain(name: str) -> str:
    """Return a module's name as the kernel has it."""
    return name.replace("-", "_")


def _unpacked(path: Path) -> tuple[str, bytes]:
    """Return a module's name and content; the kernel itself unpacks it if this host cannot."""
    content = path.read_bytes()
    if unpack := _UNPACKERS.get(path.suffix):
        return path.stem, unpack(content)
    if path.suffix == ".zst" and (program := shutil.which("zstd")):
        with workspace("module") as folder:
            unpacked = folder / path.stem
            run([program, "-dq", path, "-o", unpacked], timeout=UNPACK_SECONDS)
            return path.stem, unpacked.read_bytes()
    return path.name, content


_UNPACKERS: Mapping[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
}


def _cpio(entries: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """Yield an archive of names, modes and contents."""
    for number, (name, mode, content) in enumerate(entries, 1):
        named = name.encode() + b"\0"
        # inode, mode, uid, gid, nlink, mtime, size, four device numbers, name, checksum
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(named), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + named
        yield _padded(head)
        yield _padded(content)


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 4)
