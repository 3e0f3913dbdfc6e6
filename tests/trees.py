"""Guest trees for tests that read files only: made in a temporary directory, or real ones."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tests.conftest import require
from vmprovision.host.cache import cache_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA = Path(__file__).resolve().parent / "data"
REAL_ETC = DATA / "trees"
RELEASE_FILES = DATA / "release-files"
ROOT_FILESYSTEMS = DATA / "root-filesystems.sha256"
DATA_VARIABLE = "VMPROVISION_TEST_DATA"


@dataclass(frozen=True)
class Link:
    """A symbolic link in a tree."""

    target: str


@dataclass(frozen=True)
class Program:
    """An executable file in a tree."""

    content: bytes


def root_filesystems() -> Path:
    """Return the folder of the optional root filesystems: tests/data/README.md."""
    if named := os.environ.get(DATA_VARIABLE):
        return Path(named).expanduser()
    return cache_directory() / "test-data"


def root_filesystem(name: str) -> Path | None:
    """Return the tarball of that name, or None if this host does not have it.

    Raises:
        ValueError: it is there, and its SHA-256 is not the one in ``ROOT_FILESYSTEMS``.
    """
    lines = ROOT_FILESYSTEMS.read_text(encoding="utf-8").splitlines()
    wanted = {file: digest for digest, file in (line.split() for line in lines)}[name]
    path = root_filesystems() / name
    if not path.exists():
        return None
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        message = f"{path} does not have the SHA-256 {wanted}: download it again"
        raise ValueError(message)
    return path


def require_root_filesystem(name: str) -> Path:
    """Return the tarball of that name; skip the test if this host does not have it."""
    path = root_filesystem(name)
    reason = f"{name} is not in {root_filesystems()}: tests/data/README.md says where to get it"
    require(path, reason, optional=True)
    assert path is not None
    return path


def elf(machine: int = 62, *, bits: int = 64, content: bytes = b"") -> Program:
    """Return an ELF file's header for a machine (elf(5)), with these bytes behind it."""
    identity = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HH", 2, machine)
    if machine == 40:  # EABI version 5
        header = header.ljust(36, b"\0") + struct.pack("<I", 5 << 24)
    return Program(header.ljust(64, b"\0") + content)


Content = str | bytes | Link | Program | None
Tree = dict[str, Content]


def make_tree(root: Path, files: Mapping[str, Content]) -> Path:
    """Make these files under root and return it; None makes a directory."""
    for name, what in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            path.mkdir(exist_ok=True)
        elif isinstance(what, Link):
            path.symlink_to(what.target)
        elif isinstance(what, Program):
            path.write_bytes(what.content)
            path.chmod(0o755)
        else:
            path.write_bytes(what.encode() if isinstance(what, str) else what)
    return root


PYTHON_MODULES = ("zlib", "select", "_socket")


def python_tree(
    program: str = "/usr/bin/python3.11",
    *,
    machine: int = 62,
    bits: int = 64,
    modules: tuple[str, ...] = PYTHON_MODULES,
) -> Tree:
    """Return a complete Python for the agent, and the link ``python3`` to it."""
    path = PurePosixPath(program)
    library = path.parent.parent / "lib" / path.name
    return {
        program: elf(machine, bits=bits),
        str(path.parent / "python3"): Link(path.name),
        str(library / "os.py"): "# os\n",
        **{
            str(library / f"lib-dynload/{name}.cpython-311.so"): elf(machine, bits=bits)
            for name in modules
        },
    }


OS_RELEASE = 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\n'

SYSTEMD_TREE: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/usr/lib/systemd/systemd": elf(),
    "/usr/sbin/init": Link("../lib/systemd/systemd"),
    **python_tree(),
    "/usr/lib/x86_64-linux-gnu": None,
    "/sbin": Link("usr/sbin"),
    "/bin": Link("usr/bin"),
    "/lib": Link("usr/lib"),
    "/etc/systemd/system/multi-user.target.wants": None,
    "/usr/local/bin": None,
}

BUSYBOX_TREE: Tree = {
    "/bin/busybox": elf(content=b"BusyBox v1.35.0"),
    "/sbin/init": Link("/bin/busybox"),
    "/etc/inittab": "::sysinit:/etc/rc\n",
    **python_tree(),
}


def tree_state(root: Path) -> dict[str, tuple[str, int, int, int, bytes]]:
    """Return kind, mode, owner and content of every path under root, to compare two trees."""
    state = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        kind = "l" if path.is_symlink() else "d" if path.is_dir() else "f"
        content = (
            str(path.readlink()).encode()
            if kind == "l"
            else path.read_bytes()
            if kind == "f"
            else b""
        )
        mode = 0 if kind == "l" else status.st_mode & 0o7777
        state[str(path.relative_to(root))] = (kind, mode, status.st_uid, status.st_gid, content)
    return state
