"""Runtimes from source: MicroPython's unix port with what ``port`` adds, linked statically.

This host's own architecture takes musl-gcc where it is there; all others, and
this one too, the ziglang wheel.  Everything is made in a temporary folder, and
what comes out of it is checked before it gets its name in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.changes.conditions import digest
from vmprovision.errors import BundledRuntimeError, CommandError
from vmprovision.host.cache import locked, write_atomically
from vmprovision.host.command import run
from vmprovision.host.workspace import workspace
from vmprovision.runtime import preprocess
from vmprovision.runtime.source import VERSION, unpack_source
from vmprovision.runtime.store import (
    LICENCES,
    PORT,
    Runtime,
    cached_folder,
    check_program,
    file_name,
    find_runtime,
    host_architecture,
    list_runtimes,
    load,
    read_list,
    write_list,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.progress import Control

MAKE_SECONDS = 1800.0
VERSION_SECONDS = 60.0
SOURCE_DATE_EPOCH = "1767225600"  # 2026-01-01, so that the same inputs give the same bytes
VARIANT = "guest"
# MicroPython's own ways to see the registers and to unwind are written for gcc.
# Under clang the first fails everywhere, the second on two architectures.
_REGISTERS = "-DMICROPY_GCREGS_SETJMP=1"
_UNWINDING = "-DMICROPY_NLR_SETJMP=1"
MUSL_GCC_LICENCE = Path("/usr/share/doc/musl-dev/copyright")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How zig compiles for an architecture: the oldest processor of its kind, and definitions."""

    triple: str
    processor: str = ""
    definitions: tuple[str, ...] = (_REGISTERS,)


ZIG_TARGETS = {
    "x86_64": Target(triple="x86_64-linux-musl"),
    "aarch64": Target(triple="aarch64-linux-musl"),
    "armv7l": Target(triple="arm-linux-musleabi", processor="arm926ej_s"),
    "i386": Target(triple="x86-linux-musl", processor="i486", definitions=(_REGISTERS, _UNWINDING)),
    "riscv64": Target(triple="riscv64-linux-musl"),
    "ppc64le": Target(triple="powerpc64le-linux-musl", definitions=(_REGISTERS, _UNWINDING)),
    "s390x": Target(triple="s390x-linux-musl"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """What compiles for one architecture.

    Attributes:
        compiler: the words of its command.
        name: its name and version, for ``RUNTIMES.json``.
        musl_licence: the file with the licence of the C library that it links.
        definitions: what the preprocessor is told besides.
    """

    compiler: tuple[str, ...]
    name: str
    musl_licence: Path
    definitions: tuple[str, ...] = ()


def build_runtimes(
    architectures: Sequence[str],
    *,
    source: Path | None = None,
    refresh: bool = False,
    control: Control,
) -> tuple[Runtime, ...]:
    """The runtimes for these architectures; those that are not there yet are built.

    Args:
        architectures: of ``ARCHITECTURES``.
        source: the tarball of MicroPython's source, where the caller has it.
        refresh: build what is there already, too.
        control: progress and cancelling.

    Raises:
        BundledRuntimeError: the source or a compiler is missing, or it does not compile.
        CancelledError: the caller cancelled.
    """
    folder = cached_folder()
    waiting = "waiting for another build of runtimes"
    try:
        with locked(folder.with_suffix(".lock"), lambda: control.step(waiting)):
            missing = [name for name in architectures if refresh or not _is_there(name)]
            if missing:
                _build(missing, source, folder, control)
    except OSError as exc:
        raise BundledRuntimeError(f"{exc.filename}: {exc.strerror}") from exc
    return tuple(runtime for runtime in list_runtimes() if runtime.architecture in architectures)


def _is_there(architecture: str) -> bool:
    """Whether there is a runtime, as it should be."""
    try:
        load(find_runtime(architecture))
    except BundledRuntimeError:
        return False
    return True


def _build(architectures: list[str], given: Path | None, folder: Path, control: Control) -> None:
    toolchains = {name: find_toolchain(name) for name in architectures}
    with workspace("runtime") as workshop:
        control.step("getting the source of MicroPython")
        source = unpack_source(given, workshop)
        _lay_port(source)
        control.step("compiling MicroPython's own compiler")
        _make(source / "mpy-cross", [f"CC={shlex.join(_host_compiler())}"], workshop)
        for architecture, toolchain in toolchains.items():
            control.step(f"compiling the runtime for {architecture}")
            content = _compile(source, architecture, toolchain, workshop)
            _keep(content, architecture, toolchain, source, folder)


def _lay_port(source: Path) -> None:
    """Put our files where MicroPython's makefiles look for a variant of the unix port."""
    variant = source / "ports" / "unix" / "variants" / VARIANT
    shutil.copytree(PORT, variant)
    (variant / "main.c").replace(source / "ports" / "unix" / "main.c")


def _compile(source: Path, architecture: str, toolchain: Toolchain, workshop: Path) -> bytes:
    compiler = shlex.join(toolchain.compiler)
    one_by_one = shlex.join([sys.executable, str(Path(preprocess.__file__))])
    settings = [
        f"VARIANT={VARIANT}",
        f"BUILD=build-{architecture}",
        f"CC={compiler}",
        f"CPP={one_by_one} {compiler} -E",
        "LDFLAGS_ARCH=-Wl,--gc-sections",  # without the map, which zig cannot write
        f"CFLAGS_EXTRA={' '.join(toolchain.definitions)}",
    ]
    unix = source / "ports" / "unix"
    _make(unix, settings, workshop)
    content = (unix / f"build-{architecture}" / "python").read_bytes()
    check_program(content, architecture, f"the runtime for {architecture}")
    return content


def _keep(
    content: bytes, architecture: str, toolchain: Toolchain, source: Path, folder: Path
) -> None:
    runtime = Runtime(
        architecture=architecture,
        path=folder / file_name(architecture),
        sha256=digest(content),
        size=len(content),
        micropython=VERSION,
        compiler=toolchain.name,
    )
    write_atomically(runtime.path, content)
    runtime.path.chmod(0o755)
    write_atomically(folder / LICENCES, _licences(source, toolchain.musl_licence))
    others = [other for other in read_list(folder) if other.architecture != architecture]
    write_list(folder, (*others, runtime))


def _licences(source: Path, musl: Path) -> bytes:
    """The licences of all that is linked into a runtime."""
    uzlib = (source / "lib" / "uzlib" / "tinflate.c").read_bytes().partition(b"*/")[0] + b"*/\n"
    parts = {
        "MicroPython": (source / "LICENSE").read_bytes(),
        "uzlib, in MicroPython's source": uzlib,
        "musl": musl.read_bytes(),
    }
    return b"\n".join(f"=== {name} ===\n\n".encode() + text for name, text in parts.items())


def _make(folder: Path, settings: list[str], workshop: Path) -> None:
    """Run make where nothing of this environment changes what comes out."""
    environment = dict.fromkeys(("CFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS"), "")
    environment |= {
        "MICROPY_GIT_TAG": f"v{VERSION}",
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "ZIG_GLOBAL_CACHE_DIR": str(workshop / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(workshop / "zig"),
    }
    jobs = f"-j{os.cpu_count() or 1}"
    command = ["make", jobs, "STRIP=", "SIZE=true", *settings]
    try:
        run(command, folder=folder, environment=environment, timeout=MAKE_SECONDS)
    except CommandError as exc:
        raise BundledRuntimeError(
            f"the runtime does not compile: {exc.message}",
            hint="Debian's packages gcc, libc6-dev, make and musl-tools are what it needs",
        ) from exc


def find_toolchain(architecture: str) -> Toolchain:
    """What compiles for an architecture on this host.

    Raises:
        BundledRuntimeError: nothing does.
    """
    if architecture == host_architecture() and shutil.which("musl-gcc"):
        version = run(["musl-gcc", "--version"], timeout=VERSION_SECONDS).stdout.splitlines()[0]
        return Toolchain(
            compiler=("musl-gcc",), name=f"musl-gcc: {version}", musl_licence=MUSL_GCC_LICENCE
        )
    zig = _find_zig()
    if zig is None:
        ways = ["`pip install ziglang` into vmprovision's environment"]
        if architecture == host_architecture():
            ways.insert(0, "install Debian's packages gcc, libc6-dev, make and musl-tools")
        raise BundledRuntimeError(
            f"nothing here compiles for {architecture}", hint=", or ".join(ways)
        )
    version = run([zig, "version"], timeout=VERSION_SECONDS).stdout.strip()
    target = ZIG_TARGETS[architecture]
    processor = (f"-mcpu={target.processor}",) if target.processor else ()
    return Toolchain(
        compiler=(str(zig), "cc", "-target", target.triple, *processor),
        name=f"zig {version}",
        musl_licence=zig.parent / "lib" / "libc" / "musl" / "COPYRIGHT",
        definitions=target.definitions,
    )


def _host_compiler() -> list[str]:
    """What compiles a program that runs here, while the runtimes are made."""
    zig = _find_zig()
    return [str(zig), "cc"] if zig and not shutil.which("gcc") else ["gcc"]


def _find_zig() -> Path | None:
    """The compiler in the ziglang wheel; None where that is not installed."""
    wheel = importlib.util.find_spec("ziglang")
    return Path(wheel.origin).with_name("zig") if wheel and wheel.origin else None
