"""Find the guest's Pythons, and judge without running them whether they can run the agent."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import printable
from vmprovision.filesystem.elf import architecture_of, elf_architecture, read_elf
from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.guest.facts import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmprovision.filesystem.elf import ElfFile
    from vmprovision.filesystem.protocol import GuestReader

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
# Compiled modules that the agent or its launcher imports and that a small Python may lack,
# each with a word that only the module itself contains.
MODULES = {"zlib": b"zlib.Decompress", "select": b"select.epoll", "_socket": b"_socket.socket"}
LIBRARY_FOLDERS = ("/usr/local/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib64")
PREFIXES = (PurePosixPath("/usr"), PurePosixPath("/usr/local"))
PROGRAM_LIMIT = 32 << 20
PATH_LIMIT = 4096
FOLDERS_LIMIT = 100
_VERSION = re.compile(r"python(\d\.\d+)[dmu]*$")  # python3.6m is python3.6


def find_interpreters(reader: GuestReader, arch: str) -> tuple[Interpreter, ...]:
    """Return every Python in the usual places, each real file once, best-known name first.

    Args:
        reader: the guest's files.
        arch: the architecture of the guest's programs, or ``unknown``.
    """
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
        version = _version(reader, path, real)
        found[real] = Interpreter(
            path=path,
            version=version,
            implementation="micropython" if "micropython" in real.name else "cpython",
            fault=_fault(reader, real, version, arch),
        )
    return tuple(found.values())


def _version(reader: GuestReader, path: PurePosixPath, real: PurePosixPath) -> str | None:
    """Return the version by the file's name, else by the only standard library beside it."""
    for name in (real.name, path.name):
        if match := _VERSION.search(name):
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


def _fault(reader: GuestReader, real: PurePosixPath, version: str | None, arch: str) -> str:
    """Return why a Python cannot run the agent, as the end of a sentence; empty if it can."""
    program = read_elf(reader, real)
    if program is None:
        return "is not a program but a script or an empty file"
    if arch not in ("unknown", program.architecture):
        return f"is for {program.architecture}"
    if program.loader and architecture_of(reader, _path(program.loader)) != program.architecture:
        return f"needs the loader {printable(program.loader)}, which is not there"
    library, missing = _own_library(reader, real, program)
    if missing:
        return f"needs the library {printable(missing)}, which is not there"
    folders = list(_standard_library(reader, real, version)) if version else []
    if not folders:
        return "has no standard library"
    programs = {real: program, **library}
    lacking = [
        name
        for name, word in MODULES.items()
        if not _is_built_in(name, programs)
        and not _is_beside(reader, name, folders, program.architecture)
        and not _is_inside(reader, word, programs)
    ]
    return f"lacks {', '.join(lacking)}" if lacking else ""


def _path(text: str) -> PurePosixPath:
    """Return a path from an ELF file, of a length that a guest can have."""
    return PurePosixPath("/") / text[:PATH_LIMIT]


def _own_library(
    reader: GuestReader, real: PurePosixPath, program: ElfFile
) -> tuple[dict[PurePosixPath, ElfFile], str]:
    """Return the library that holds the interpreter, if separate, or the missing library's name."""
    name = next((each for each in program.libraries if each.startswith("libpython")), "")
    if not name or "/" in name:
        return {}, ""
    for folder in _library_folders(reader, real, program):
        path = resolved_file(reader, str(folder / name))
        library = read_elf(reader, path) if path else None
        if path and library and library.architecture == program.architecture:
            return {path: library}, ""
    return {}, name


def _library_folders(
    reader: GuestReader, real: PurePosixPath, program: ElfFile
) -> Iterator[PurePosixPath]:
    """Yield the directories that may hold a program's libraries: ld.so(8), and Debian's."""
    for folder in program.library_paths[:FOLDERS_LIMIT]:
        yield _path(folder.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", str(real.parent)))
    for name in LIBRARY_FOLDERS:
        yield PurePosixPath(name)
    for name in ("/lib", "/usr/lib"):
        for entry in reader.list_directory(PurePosixPath(name)):
            if "-linux-" in entry:
                yield PurePosixPath(name) / entry
    parts = PurePosixPath("/etc/ld.so.conf.d")
    files = [parts / name for name in reader.list_directory(parts)[:FOLDERS_LIMIT]]
    for path in (PurePosixPath("/etc/ld.so.conf"), *files):
        for line in (read_text(reader, path, 64 << 10) or "").splitlines()[:FOLDERS_LIMIT]:
            if line.startswith("/"):
                yield _path(line.strip())


def _standard_library(
    reader: GuestReader, real: PurePosixPath, version: str
) -> Iterator[PurePosixPath]:
    """Yield the directories of the standard library, beside the program or in a usual prefix.

    Python's own search looks for ``os.py``, or for a zip archive of the whole library.
    """
    places = [
        prefix / lib
        for prefix in dict.fromkeys((*real.parent.parents, *PREFIXES))
        for lib in ("lib", "lib64")
    ]
    archive = f"python{version.replace('.', '')}.zip"
    landmarks = [f"python{version}/{name}" for name in ("os.py", "os.pyc", "os.pyo")]
    if any(
        _has_content(reader, place / name) for place in places for name in [*landmarks, archive]
    ):
        yield from (place / f"python{version}" for place in places)


def _has_content(reader: GuestReader, path: PurePosixPath) -> bool:
    real = resolved_file(reader, str(path))
    status = reader.lstat(real) if real else None
    return status is not None and status.size > 0


def _is_beside(
    reader: GuestReader, module: str, folders: list[PurePosixPath], architecture: str
) -> bool:
    """Return whether a compiled module is a separate file for the same machine."""
    names = (module, f"{module}module")  # Python 2's
    return any(
        architecture_of(reader, folder / "lib-dynload" / name) == architecture
        for folder in folders
        for name in reader.list_directory(folder / "lib-dynload")
        if name.endswith(".so") and name.split(".")[0] in names
    )


def _is_built_in(module: str, programs: Mapping[PurePosixPath, ElfFile]) -> bool:
    """Return whether a module is built into the interpreter, by the module's entry point."""
    entry_points = (b"\0PyInit_%b\0" % module.encode(), b"\0init%b\0" % module.encode())
    return any(each in program.names for program in programs.values() for each in entry_points)


def _is_inside(reader: GuestReader, word: bytes, programs: Mapping[PurePosixPath, ElfFile]) -> bool:
    """Return whether an interpreter without dynamic symbols, such as a static one, holds a word."""
    return any(
        b"\0PyImport_Import\0" not in program.names
        and word in reader.read(path, limit=PROGRAM_LIMIT)
        for path, program in programs.items()
    )
