"""Finds the interpreters the agent is tested on: this host's CPythons and the bundled runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import require
from vmprovision.errors import BundledRuntimeError
from vmprovision.progress import Control
from vmprovision.runtime.build import build_runtimes
from vmprovision.runtime.store import host_architecture

MICROPYTHON = "micropython"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A way to run Python source.

    Attributes:
        name: what the tests call it.
        argv: the program and the options the agent is run with.

    """

    name: str
    argv: tuple[str, ...]

    @property
    def is_micropython(self) -> bool:
        """Return whether it is the bundled runtime."""
        return self.name == MICROPYTHON


def find_cpythons() -> dict[str, Interpreter]:
    """Return the CPythons of this host by name: those of pyenv, and those on the usual paths."""
    found: dict[str, Interpreter] = {}
    seen: set[Path] = set()
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*"))
    places = [(folder.name, folder / "bin" / "python") for folder in pyenv]
    places += [(name, Path("/usr/bin") / name) for name in ("python2", "python3")]
    for name, path in places:
        if path.exists() and path.resolve() not in seen:
            seen.add(path.resolve())
            label = name if name.startswith("python") else f"cpython-{name}"
            found[label] = Interpreter(name=label, argv=(str(path), "-S", "-E", "-s"))
    return found


def interpreter_names() -> list[str]:
    """Return the names of all interpreters to test on, the runtime's included, built or not."""
    return [*find_cpythons(), MICROPYTHON]


def one_of_each() -> list[str]:
    """Return one CPython and MicroPython, for tests that take seconds."""
    return [*list(find_cpythons())[-1:], MICROPYTHON]


def get_interpreter(name: str) -> Interpreter:
    """Return the interpreter of that name.

    Skips the test if the runtime cannot be built; with CI set, fails it.
    """
    if name != MICROPYTHON:
        return find_cpythons()[name]
    reason = ""
    try:
        (runtime,) = build_runtimes([host_architecture()], control=Control())
    except BundledRuntimeError as error:
        reason = str(error)
    require(not reason, reason)
    return Interpreter(name=name, argv=(str(runtime.path),))
