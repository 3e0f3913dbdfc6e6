"""Which Pythons the guest has, told without running them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.elf import elf_architecture
from vmprovision.filesystem import resolved_file
from vmprovision.guest import Interpreter

if TYPE_CHECKING:
    from vmprovision.filesystem import GuestReader

# In the order in which the agent's launcher tries them.
FOLDERS = ("/usr/bin", "/usr/local/bin", "/bin", "/opt/bin")
NAMES = (
    "python3",
    "python",
    "python2",
    *(f"python3.{minor}" for minor in range(20, 1, -1)),
    "python2.7",
    "python2.6",
    "micropython",
)
PLATFORM_PYTHON = "/usr/libexec/platform-python"
_VERSION = re.compile(r"python(\d\.\d+)$")


def find_interpreters(reader: GuestReader) -> tuple[Interpreter, ...]:
    """Every Python in the usual places, each real file once, best known name first."""
    found: dict[PurePosixPath, Interpreter] = {}
    names = set()
    for folder in FOLDERS:
        names |= {f"{folder}/{name}" for name in reader.list_directory(PurePosixPath(folder))}
    candidates = [f"{folder}/{name}" for name in NAMES for folder in FOLDERS]
    for candidate in [path for path in candidates if path in names] + [PLATFORM_PYTHON]:
        path = PurePosixPath(candidate)
        real = resolved_file(reader, path)
        status = reader.lstat(real) if real else None
        if real is None or status is None or not status.mode & 0o111 or real in found:
            continue
        if elf_architecture(reader.read(real, limit=64)) is None and real.name != path.name:
            continue
        found[real] = Interpreter(
            path=path,
            version=_version(reader, path, real),
            implementation="micropython" if "micropython" in real.name else "cpython",
        )
    return tuple(found.values())


def _version(reader: GuestReader, path: PurePosixPath, real: PurePosixPath) -> str | None:
    """The version by the file's name, else by the one standard library beside it."""
    for name in (real.name, path.name):
        if match := _VERSION.match(name):
            return match[1]
    prefix = path.parent.parent
    folders = [
        match[1]
        for name in reader.list_directory(prefix / "lib") + reader.list_directory(prefix / "lib64")
        if (match := _VERSION.match(name))
    ]
    major = re.match(r"python(\d)$", path.name)
    fitting = {version for version in folders if not major or version.startswith(major[1])}
    return fitting.pop() if len(fitting) == 1 else None
