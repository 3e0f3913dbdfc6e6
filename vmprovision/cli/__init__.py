"""The command line: the only package that prints and exits."""

from __future__ import annotations

import sys

import vmprovision


def run() -> None:
    """Run the command line; the entry point of the ``vmprovision`` program."""
    if sys.argv[1:] == ["--version"]:
        # scripts ask this often, and importing Typer would take most of the time
        sys.stdout.write(f"vmprovision {vmprovision.__version__}\n")
        return
    from vmprovision.cli.app import app

    app()
