"""What runs the agent in a guest: a Python of its own, or a runtime that is put into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmprovision.errors import BundledRuntimeError, UnsupportedGuestError
from vmprovision.runtime.store import check_program, find_runtime, load

if TYPE_CHECKING:
    from vmprovision.guest.facts import GuestInfo

RuntimeWish = Literal["auto", "guest", "bundled"] | Path
WISHES = ("auto", "guest", "bundled")
INSTALL_PYTHON = "install python3 (its minimal package is enough) in the guest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRuntime:
    """What runs the agent.

    Attributes:
        name: for a person.
        content: what is put into the guest; None where its own Python does.
    """

    name: str
    content: bytes | None = None


def choose_runtime(guest: GuestInfo, wish: RuntimeWish) -> ChosenRuntime:
    """What runs the agent in this guest, read and checked.

    Args:
        guest: its Pythons and its architecture decide.
        wish: ``auto`` takes the guest's own Python and, where it has none that is
            usable, the bundled runtime; a path is an interpreter of the caller's.

    Raises:
        UnsupportedGuestError: the guest has no usable Python, and there is no runtime for it.
        BundledRuntimeError: the runtime is damaged, or not for this guest.
    """
    if isinstance(wish, Path):
        return _read_given(guest, wish)
    own = guest.usable_python
    if own is not None and wish != "bundled":
        return ChosenRuntime(name=f"the guest's {own.path}")
    if wish == "guest":
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
