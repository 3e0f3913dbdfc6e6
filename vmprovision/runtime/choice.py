"""Choose what runs the agent in a guest: the guest's own Python, or a runtime injected with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vmprovision.errors import BundledRuntimeError, UnsupportedGuestError
from vmprovision.runtime.store import check_program, find_runtime, load

if TYPE_CHECKING:
    from vmprovision.guest.facts import GuestInfo

RuntimeName = Literal["auto", "guest", "bundled"]
RuntimeChoice = RuntimeName | Path
NAMES: dict[str, RuntimeName] = {name: name for name in get_args(RuntimeName)}
INSTALL_PYTHON = "install python3 (its minimal package is enough) in the guest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRuntime:
    """What runs the agent.

    Attributes:
        name: for a person.
        content: the interpreter to inject; None if the guest's own Python runs the agent.
    """

    name: str
    content: bytes | None = None


def parse_runtime(word: str) -> RuntimeChoice:
    """Return the choice for a word of the command line: a name, or else a path."""
    return NAMES.get(word) or Path(word)


def choose_runtime(guest: GuestInfo, choice: RuntimeChoice) -> ChosenRuntime:
    """Return what runs the agent in this guest, read and checked.

    Args:
        guest: its Pythons and its architecture decide.
        choice: ``auto`` prefers a usable Python of the guest's own to the bundled
            runtime.  A path is the caller's own interpreter.

    Raises:
        UnsupportedGuestError: the guest has no usable Python, and there is no runtime for it.
        BundledRuntimeError: the runtime is damaged, or does not fit this guest.
    """
    if isinstance(choice, Path):
        return _read_given(guest, choice)
    own = guest.usable_python
    if own is not None and choice != "bundled":
        return ChosenRuntime(name=f"the guest's {own.path}")
    if choice == "guest":
        raise UnsupportedGuestError(
            f"the guest has no Python that could run the agent{guest.unusable_pythons}",
            hint=f"leave out --runtime guest, or {INSTALL_PYTHON}",
        )
    try:
        runtime = find_runtime(guest.arch)
    except BundledRuntimeError as exc:
        lacks = (
            ""
            if own
            else f"the guest has no Python that could run the agent{guest.unusable_pythons}, and "
        )
        ways = [way for way in (exc.hint, INSTALL_PYTHON) if way]
        raise UnsupportedGuestError(lacks + exc.message, hint=", or ".join(ways)) from exc
    name = f"the bundled MicroPython {runtime.micropython} for {runtime.architecture}"
    return ChosenRuntime(name=name, content=load(runtime))


def _read_given(guest: GuestInfo, path: Path) -> ChosenRuntime:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise BundledRuntimeError(f"{path}: {exc.strerror}") from exc
    check_program(content, guest.arch, str(path))
    return ChosenRuntime(name=str(path), content=content)
