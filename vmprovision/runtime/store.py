"""Find and read runtimes, which ``RUNTIMES.json`` lists beside them in the wheel or the cache."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmprovision.changes.conditions import digest
from vmprovision.errors import BundledRuntimeError
from vmprovision.filesystem.elf import elf_architecture, runs_alone
from vmprovision.guest.names import ARCHITECTURES
from vmprovision.host.cache import cache_directory, write_atomically

LIST = "RUNTIMES.json"
LICENCES = "LICENCES"
SCHEMA = 1
PORT = Path(__file__).parent / "port"
SHIPPED = Path(__file__).parents[1] / "runtimes"
OTHER_NAMES = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "arm": "armv7l",
    "armhf": "armv7l",
    "armv6l": "armv7l",
    "armv7": "armv7l",
    "i486": "i386",
    "i586": "i386",
    "i686": "i386",
    "x86": "i386",
    "ppc64el": "ppc64le",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One runtime, as ``RUNTIMES.json`` lists it.

    Attributes:
        architecture: of its guests, as in ``GuestInfo.arch``.
        path: its file on this host.
        sha256: of its content, in hexadecimal.
        size: of its content, in bytes.
        micropython: the version of MicroPython.
        compiler: the compiler and its version.
    """

    architecture: str
    path: Path
    sha256: str
    size: int
    micropython: str
    compiler: str

    def as_json(self) -> dict[str, Any]:
        """Return the runtime as ``vmprovision runtime list --json`` prints it."""
        return {**asdict(self), "path": str(self.path)}


def architecture_named(name: str) -> str:
    """Return the architecture that has this name or alias.

    Raises:
        BundledRuntimeError: no runtime can be built for it.
    """
    architecture = OTHER_NAMES.get(name, name)
    if architecture not in ARCHITECTURES:
        raise BundledRuntimeError(
            f"there is no runtime for {name}", hint="choose one of: " + ", ".join(ARCHITECTURES)
        )
    return architecture


def host_architecture() -> str:
    """Return this host's architecture."""
    machine = platform.machine()
    return OTHER_NAMES.get(machine, machine)


def cached_folder() -> Path:
    """Return the cache's folder for runtimes, whose name changes with what they are built from."""
    inputs = hashlib.sha256()
    sources = [path for path in PORT.iterdir() if path.is_file()]
    for path in sorted([*sources, PORT.with_name("build.py"), PORT.with_name("source.py")]):
        inputs.update(f"{path.name} {digest(path.read_bytes())}\n".encode())
    return cache_directory() / "runtimes" / inputs.hexdigest()[:16]


def list_runtimes() -> tuple[Runtime, ...]:
    """Return all runtimes: those built on this host, then those shipped with this installation.

    Raises:
        BundledRuntimeError: a list is damaged.
    """
    found: dict[str, Runtime] = {}
    for folder in (cached_folder(), SHIPPED):
        for runtime in read_list(folder):
            found.setdefault(runtime.architecture, runtime)
    return tuple(found[name] for name in ARCHITECTURES if name in found)


def find_runtime(architecture: str) -> Runtime:
    """Return the runtime for an architecture.

    Raises:
        BundledRuntimeError: there is none, or a list is damaged.
    """
    for runtime in list_runtimes():
        if runtime.architecture == architecture:
            return runtime
    if architecture not in ARCHITECTURES:
        raise BundledRuntimeError(f"there is no runtime for {architecture}")
    raise BundledRuntimeError(
        f"the runtime for {architecture} is not built yet",
        hint=f"`vmprovision runtime build {architecture}` builds it",
    )


def read_list(folder: Path) -> tuple[Runtime, ...]:
    """Return the runtimes in a folder's list; none if there is no list.

    Raises:
        BundledRuntimeError: the list is damaged.
    """
    path = folder / LIST
    try:
        document = json.loads(path.read_bytes())
        return tuple(
            Runtime(
                architecture=architecture,
                path=folder / file_name(architecture),
                **{name: facts[name] for name in ("sha256", "size", "micropython", "compiler")},
            )
            for architecture, facts in document["runtimes"].items()
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BundledRuntimeError(
            f"{path} is damaged: {exc!r}", hint="remove it and run `vmprovision runtime build`"
        ) from exc


def write_list(folder: Path, runtimes: tuple[Runtime, ...]) -> None:
    """Write the list of a folder's runtimes.

    Raises:
        OSError: the list cannot be written.
    """
    facts = {
        runtime.architecture: {
            "architecture": runtime.architecture,
            "sha256": runtime.sha256,
            "size": runtime.size,
            "micropython": runtime.micropython,
            "compiler": runtime.compiler,
        }
        for runtime in runtimes
    }
    document = {"schema": SCHEMA, "runtimes": facts}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / LIST, text.encode("ascii"))


def file_name(architecture: str) -> str:
    """Return the name of a runtime's file."""
    return f"python-{architecture}"


def load(runtime: Runtime) -> bytes:
    """Return the content of a runtime, after checking its digest and its architecture.

    Raises:
        BundledRuntimeError: it is damaged, or cannot be read.
    """
    rebuild = f"run `vmprovision runtime build --refresh {runtime.architecture}`"
    try:
        content = runtime.path.read_bytes()
    except OSError as exc:
        raise BundledRuntimeError(f"{runtime.path}: {exc.strerror}", hint=rebuild) from exc
    if digest(content) != runtime.sha256:
        raise BundledRuntimeError(
            f"{runtime.path} does not have the SHA-256 that {LIST} lists", hint=rebuild
        )
    check_program(content, runtime.architecture, str(runtime.path))
    return content


def check_program(content: bytes, architecture: str, name: str) -> None:
    """Check that a file is a static program for an architecture.

    Raises:
        BundledRuntimeError: it is not.
    """
    found = elf_architecture(content)
    if found != architecture:
        raise BundledRuntimeError(
            f"{name} is not a program for {architecture}: it is "
            + (f"for {found}" if found else "not an ELF file")
        )
    if not runs_alone(content):
        raise BundledRuntimeError(
            f"{name} is damaged or needs libraries that the guest may lack",
            hint="link it statically",
        )
