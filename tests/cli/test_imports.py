"""The program imports only what it needs, so that short commands answer at once."""

from __future__ import annotations

import subprocess
import sys

import vmprovision

# Modules that take long to import.
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
# Packages that only commands that work on an image need.
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
        "seed",
        "selinux",
    )
}


def imported(code: str, *arguments: str, check: bool = True) -> set[str]:
    """Return the modules that a process imports by running this code, besides Python's start."""
    see = (
        "import atexit, sys; before = set(sys.modules); "
        "atexit.register(lambda: print(*set(sys.modules) - before, file=sys.stderr))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{see}; {code}", *arguments],
        capture_output=True,
        check=check,
        text=True,
        timeout=120,
    )
    return set(done.stderr.split())


PROGRAM = "from vmprovision.cli import run; run()"


def test_the_version_is_printed_without_any_of_them() -> None:
    """--version alone does not even need Typer."""
    found = imported(PROGRAM, "--version")
    assert "vmprovision.cli" in found
    assert not found & (HEAVY | WORK | {"typer", "vmprovision.cli.app"})


def test_a_command_imports_no_other_rooms_before_it_runs() -> None:
    """With other options before it, Typer reads the command line, and prints the same."""
    found = imported(PROGRAM, "-v", "--version")
    assert "vmprovision.cli.app" in found
    assert not found & (HEAVY | WORK)
    versions = {
        subprocess.run(
            [sys.executable, "-m", "vmprovision", *options],
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for options in (["--version"], ["-v", "--version"])
    }
    assert versions == {f"vmprovision {vmprovision.__version__}\n".encode()}


def test_help_imports_no_room_either() -> None:
    """--help needs Typer and rich only."""
    found = imported(PROGRAM, "inject", "--help")
    assert "vmprovision.cli.injection" in found
    assert not found & (WORK | {"distributed", "guestfs", "jinja2"})


def test_a_command_without_a_terminal_draws_nothing() -> None:
    """Only bars on a terminal need rich, and nothing needs Pydantic."""
    found = imported(PROGRAM, "inspect", "/nonexistent.qcow2", check=False)
    assert "vmprovision.api" in found
    assert not found & {"rich", "pydantic", "jinja2", "distributed"}


def test_looking_into_a_guest_imports_no_templates_and_no_cluster() -> None:
    """The library's functions need neither Jinja2 nor Dask nor the command line's libraries."""
    found = imported("import vmprovision; vmprovision.inspect; vmprovision.verify")
    assert "vmprovision.api" in found
    assert not found & {"jinja2", "distributed", "asyncio", "http.client", "rich", "typer"}


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    """Each public name is imported when it is first used."""
    found = imported("import vmprovision")
    assert {name for name in found if name.startswith("vmprovision")} == {"vmprovision"}
    assert not found & HEAVY
    found = imported("from vmprovision import VmprovisionError")
    assert {name for name in found if name.startswith("vmprovision")} == {
        "vmprovision",
        "vmprovision.errors",
    }


def test_every_public_name_can_be_seen_and_used() -> None:
    """dir() and a star import know every public name; other names are an AttributeError."""
    assert set(vmprovision.__all__) <= set(dir(vmprovision))
    names: dict[str, object] = {}
    exec("from vmprovision import *", names)  # noqa: S102 -- as a person at the prompt does
    assert set(vmprovision.__all__) <= names.keys()
    assert not hasattr(vmprovision, "no_such_name")
