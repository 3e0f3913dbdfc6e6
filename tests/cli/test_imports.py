"""What the program loads before it knows what to do."""

from __future__ import annotations

import subprocess
import sys

import vmprovision

# Each of them takes longer to import than `--version` may.
HEAVY = {
    "asyncio",
    "concurrent.futures",
    "dask",
    "distributed",
    "guestfs",
    "http.client",
    "jinja2",
    "logging",
    "rich",
    "xml",
    "zipfile",
}
# Rooms that only a command that works on an image needs.
WORK = {
    f"vmprovision.{name}"
    for name in (
        "agent",
        "api",
        "appliance",
        "batch",
        "changes",
        "doctor",
        "image",
        "initsystem",
        "inspection",
        "planning",
        "progress",
        "proof",
        "recipe",
        "reports",
        "runtime",
        "selinux",
    )
}


def imported(code: str, *arguments: str) -> set[str]:
    """Return the modules that a process has imported when it has run this code."""
    see = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = subprocess.run(
        [sys.executable, "-c", f"{see}; {code}", *arguments],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    return set(done.stderr.split())


PROGRAM = "from vmprovision.cli import run; run()"


def test_the_version_is_printed_without_the_rooms_that_work() -> None:
    """Neither libraries that take long to import nor a room beside the command line."""
    found = imported(PROGRAM, "--version")
    assert "vmprovision.cli.app" in found
    assert not found & (HEAVY | WORK)


def test_help_imports_no_room_either() -> None:
    """Typer prints it with rich, which is all that it needs."""
    found = imported(PROGRAM, "inject", "--help")
    assert "vmprovision.cli.injection" in found
    assert not found & (WORK | {"distributed", "guestfs", "jinja2"})


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    """A public name is imported when it is used."""
    found = imported("import vmprovision")
    assert {name for name in found if name.startswith("vmprovision")} == {"vmprovision"}
    assert not found & HEAVY
    found = imported("from vmprovision import VmprovisionError")
    assert {name for name in found if name.startswith("vmprovision")} == {
        "vmprovision",
        "vmprovision.errors",
    }


def test_every_public_name_can_be_seen_and_used() -> None:
    """By dir(), by a star import, and with the error that modules give for other names."""
    assert set(vmprovision.__all__) <= set(dir(vmprovision))
    names: dict[str, object] = {}
    exec("from vmprovision import *", names)  # noqa: S102 -- as a person at the prompt does
    assert set(vmprovision.__all__) <= names.keys()
    assert not hasattr(vmprovision, "no_such_name")
