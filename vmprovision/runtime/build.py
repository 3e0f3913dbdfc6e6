"""Build runtimes from source: MicroPython's unix port and our ``port``, linked statically.

This host's own architecture is compiled by musl-gcc if that is installed; other
architectures, and otherwise this one, by the ziglang wheel.  Each runtime is checked
before it gets its name in the cache.
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
from vmprovision.host.cache import build_directory, write_atomically
from vmprovision.host.command import run
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
SOURCE_DATE_EPOCH = "1767225600"  # 2026-01-01: the same inputs give the same bytes
VARIANT = "guest"
# MicroPython's own code to read the registers and to unwind is written for gcc.
# With clang the former fails everywhere, the latter on two architectures.
_REGISTERS = "-DMICROPY_GCREGS_SETJMP=1"
_UNWINDING = "-DMICROPY_NLR_SETJMP=1"
MUSL_GCC_LICENCE = Path("/usr/share/doc/musl-dev/copyright")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How zig compiles for an architecture: for its oldest processor, with these definitions."""

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
    # without a name zig compiles for z13, whose vector instructions older ones lack
    "s390x": Target(triple="s390x-linux-musl", processor="z10"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A compiler for one architecture.

    Attributes:
        compiler: the words of its command.
        name: its name and version, for ``RUNTIMES.json``.
        musl_licence: the file with the licence of the C library that it links.
        definitions: additional options of the preprocessor.
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
    """Return the runtimes for these architectures; build those that are missing.

    Args:
        architectures: of ``ARCHITECTURES``.
        source: the tarball of MicroPython's source, if the caller has it.
        refresh: also build those that exist.
        control: progress and cancellation.

    Raises:
        BundledRuntimeError: the source or a compiler is missing, or it does not compile.
        CancelledError: the caller cancelled.
    """
    folder = cached_folder()
    waiting = "waiting for another build of runtimes"
    try:
        with build_directory(folder, lambda: control.step(waiting)) as directory:
            missing = [name for name in architectures if refresh or not _is_usable(name)]
            if missing:
                _build(missing, source, directory, folder, control)
    except OSError as exc:
        raise BundledRuntimeError(f"{exc.filename}: {exc.strerror}") from exc
    return tuple(runtime for runtime in list_runtimes() if runtime.architecture in architectures)


def _is_usable(architecture: str) -> bool:
    """Whether there is an undamaged runtime."""
    try:
        load(find_runtime(architecture))
    except BundledRuntimeError:
        return False
    return True


def _build(
    architectures: list[str], given: Path | None, directory: Path, target: Path, control: Control
) -> None:
    toolchains = {name: find_toolchain(name) for name in architectures}
    control.step("fetching the source of MicroPython")
    source = unpack_source(given, directory)
    _copy_port(source)
    control.step("compiling MicroPython's own compiler")
    _make(source / "mpy-cross", [f"CC={shlex.join(_host_compiler())}"], directory)
    for architecture, toolchain in toolchains.items():
        control.step(f"compiling the runtime for {architecture}")
        content = _compile(source, architecture, toolchain, directory)
        _store(content, architecture, toolchain, source, target)


def _copy_port(source: Path) -> None:
    """Copy our files to where MicroPython's makefiles look for a variant of the unix port."""
    variant = source / "ports" / "unix" / "variants" / VARIANT
    shutil.copytree(PORT, variant)
    (variant / "main.c").replace(source / "ports" / "unix" / "main.c")


def _compile(source: Path, architecture: str, toolchain: Toolchain, directory: Path) -> bytes:
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
    _make(unix, settings, directory)
    content = (unix / f"build-{architecture}" / "python").read_bytes()
    check_program(content, architecture, f"the runtime for {architecture}")
    return content


def _store(
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
    """Return the licences of everything that is linked into a runtime."""
    uzlib = (source / "lib" / "uzlib" / "tinflate.c").read_bytes().partition(b"*/")[0] + b"*/\n"
    parts = {
        "MicroPython": (source / "LICENSE").read_bytes(),
        "uzlib, in MicroPython's source": uzlib,
        "musl": musl.read_bytes(),
    }
    return b"\n".join(f"=== {name} ===\n\n".encode() + text for name, text in parts.items())


def _make(folder: Path, settings: list[str], directory: Path) -> None:
    """Run make so that nothing of this environment changes its result."""
    environment = dict.fromkeys(("CFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS"), "")
    environment |= {
        "MICROPY_GIT_TAG": f"v{VERSION}",
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "ZIG_GLOBAL_CACHE_DIR": str(directory / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(directory / "zig"),
    }
    jobs = f"-j{os.cpu_count() or 1}"
    command = ["make", jobs, "STRIP=", "SIZE=true", *settings]
    try:
        run(command, folder=folder, environment=environment, timeout=MAKE_SECONDS)
    except CommandError as exc:
        raise BundledRuntimeError(
            f"the runtime does not compile: {exc.message}",
            hint="it needs Debian's packages gcc, libc6-dev, make and musl-tools",
        ) from exc


def find_toolchain(architecture: str) -> Toolchain:
    """Return what compiles for an architecture on this host.

    Raises:
        BundledRuntimeError: no compiler for it is installed.
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
            f"this host has no compiler for {architecture}", hint=", or ".join(ways)
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
    """Return the compiler of programs that run here during the build."""
    zig = _find_zig()
    return [str(zig), "cc"] if zig and not shutil.which("gcc") else ["gcc"]


def _find_zig() -> Path | None:
    """Return the compiler in the ziglang wheel; None if that is not installed."""
    wheel = importlib.util.find_spec("ziglang")
    return Path(wheel.origin).with_name("zig") if wheel and wheel.origin else None
