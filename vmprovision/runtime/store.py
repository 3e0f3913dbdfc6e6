"""What runtimes there are: ``RUNTIMES.json`` beside them, in the wheel or in the cache."""

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
from vmprovision.host.cache import cache_directory, write_atomically

LIST = "RUNTIMES.json"
LICENCES = "LICENCES"
SCHEMA = 1
PORT = Path(__file__).parent / "port"
SHIPPED = Path(__file__).parents[1] / "runtimes"
# as GuestInfo has them; 32-bit ARM is made for the oldest, ARMv5, and i386 for an i486
ARCHITECTURES = ("x86_64", "aarch64", "armv7l", "i386", "riscv64", "ppc64le", "s390x")
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
        architecture: of the guests that it is for, as ``GuestInfo.arch`` has it.
        path: where it is on this host.
        sha256: of its content, in hexadecimal.
        size: of its content, in bytes.
        micropython: the version that it is made of.
        compiler: what compiled it, with version.
    """

    architecture: str
    path: Path
    sha256: str
    size: int
    micropython: str
    compiler: str

    def as_json(self) -> dict[str, Any]:
        """The runtime as ``vmprovision runtime list --json`` prints it."""
        return {**asdict(self), "path": str(self.path)}


def architecture_named(name: str) -> str:
    """The architecture that goes by this or another name.

    Raises:
        BundledRuntimeError: no runtime can be built for it.
    """
    architecture = OTHER_NAMES.get(name, name)
    if architecture not in ARCHITECTURES:
        raise BundledRuntimeError(
            f"there is no runtime for {name}", hint="there are: " + ", ".join(ARCHITECTURES)
        )
    return architecture


def host_architecture() -> str:
    """This host's architecture."""
    machine = platform.machine()
    return OTHER_NAMES.get(machine, machine)


def cached_folder() -> Path:
    """Where runtimes are built to; another folder for every change of what they are made from."""
    inputs = hashlib.sha256()
    sources = [path for path in PORT.iterdir() if path.is_file()]
    for path in sorted([*sources, PORT.with_name("build.py"), PORT.with_name("source.py")]):
        inputs.update(f"{path.name} {digest(path.read_bytes())}\n".encode())
    return cache_directory() / "runtimes" / inputs.hexdigest()[:16]


def list_runtimes() -> tuple[Runtime, ...]:
    """All runtimes that there are: those built here, then those shipped with this installation.

    Raises:
        BundledRuntimeError: a list is damaged.
    """
    found: dict[str, Runtime] = {}
    for folder in (cached_folder(), SHIPPED):
        for runtime in read_list(folder):
            found.setdefault(runtime.architecture, runtime)
    return tuple(found[name] for name in ARCHITECTURES if name in found)


def find_runtime(architecture: str) -> Runtime:
    """The runtime for an architecture.

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
    """The runtimes that a folder's list names; none where there is no list.

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
        OSError: it cannot be written.
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
    """What a runtime's file is called."""
    return f"python-{architecture}"


def load(runtime: Runtime) -> bytes:
    """The content of a runtime, which is what the list says and a program for its architecture.

    Raises:
        BundledRuntimeError: it is not, or cannot be read.
    """
    mend = f"run `vmprovision runtime build --refresh {runtime.architecture}`"
    try:
        content = runtime.path.read_bytes()
    except OSError as exc:
        raise BundledRuntimeError(f"{runtime.path}: {exc.strerror}", hint=mend) from exc
    if digest(content) != runtime.sha256:
        raise BundledRuntimeError(f"{runtime.path} is not what {LIST} lists", hint=mend)
    check_program(content, runtime.architecture, str(runtime.path))
    return content


def check_program(content: bytes, architecture: str, name: str) -> None:
    """Check that a file is a program for an architecture that needs nothing else in a guest.

    Raises:
        BundledRuntimeError: it is not.
    """
    found = elf_architecture(content)
    if found != architecture:
        raise BundledRuntimeError(
            f"{name} is no program for {architecture}"
            + (f" but for {found}" if found else ": it is no ELF file")
        )
    if not runs_alone(content):
        raise BundledRuntimeError(
            f"{name} is damaged, or linked with libraries that the guest may lack",
            hint="link it statically",
        )
