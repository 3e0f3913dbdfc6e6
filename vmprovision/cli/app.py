"""The program ``vmprovision``: its commands, and the options before them.

The modules of this package import little when they are loaded.  Each command imports
what it needs when it runs, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import vmprovision
from vmprovision.cli import (
    agent,
    appliances,
    bake,
    guest,
    host,
    images,
    injection,
    runtimes,
    seed,
    serve,
)
from vmprovision.cli.commands import App

app = App(
    name="vmprovision",
    help="Install a guest agent offline in any Linux disk image: no root, no mounts, no KVM "
    "needed. Afterwards the image is either finished or untouched.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    guest.inspect,
    injection.plan,
    injection.inject,
    seed.seed,
    guest.verify,
    guest.remove,
    guest.recover,
    guest.prove,
    bake.bake,
    serve.serve,
    agent.render,
    host.doctor,
):
    app.command()(command)
app.add_typer(agent.app, name="agent")
app.add_typer(images.app, name="image")
app.add_typer(runtimes.app, name="runtime")
app.add_typer(appliances.app, name="appliance")


def _print_version(value: bool) -> None:  # noqa: FBT001 -- typer's callback
    if value:
        typer.echo(f"vmprovision {vmprovision.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Log each step; twice for every call.",
            show_default=False,
            metavar="",
        ),
    ] = 0,
    _shown: Annotated[  # noqa: FBT002 -- a flag
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    import logging

    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logging.basicConfig(
        stream=sys.stderr,
        level=levels[min(verbose, 2)],
        format="%(levelname)s %(name)s: %(message)s",
    )
