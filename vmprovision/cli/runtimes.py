"""``vmprovision runtime``: interpreters for guests without Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmprovision.cli.commands import App
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import present, work
from vmprovision.guest.names import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision import Control
    from vmprovision.runtime.store import Runtime

app = App(
    help="Small interpreters for guests without Python, built from MicroPython's source.",
)


@app.command("build")
def build(
    architectures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARCH",
            show_default=False,
            help="all, or one or more of: "
            + ", ".join(ARCHITECTURES)
            + ". By default this host's architecture.",
        ),
    ] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The tarball of the source, instead of fetching it with apt."
        ),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Build runtimes even if they are there already.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build runtimes from Debian's source of MicroPython; later take them from the cache.

    This host's architecture needs Debian's packages gcc, libc6-dev, make and
    musl-tools, the others need the ziglang wheel.
    """

    def built(control: Control) -> tuple[Runtime, ...]:
        from vmprovision.runtime.build import build_runtimes
        from vmprovision.runtime.store import architecture_named, host_architecture

        wanted = architectures or [host_architecture()]
        names = ARCHITECTURES if "all" in wanted else [architecture_named(a) for a in wanted]
        return build_runtimes(names, source=source, refresh=refresh, control=control)

    _present_runtimes(built, as_json=as_json)


@app.command("list")
def list_(*, as_json: JsonOption = False) -> None:
    """List the runtimes that are available."""

    def listed(_: Control) -> tuple[Runtime, ...]:
        from vmprovision.runtime.store import list_runtimes

        return list_runtimes()

    _present_runtimes(listed, as_json=as_json)


@app.command("verify")
def verify(*, as_json: JsonOption = False) -> None:
    """Check every runtime as an injection does: its hash, its architecture, that it runs alone."""

    def verified(_: Control) -> tuple[Runtime, ...]:
        from vmprovision.runtime.store import list_runtimes, load

        runtimes = list_runtimes()
        for runtime in runtimes:
            load(runtime)
        return runtimes

    _present_runtimes(verified, as_json=as_json)


def _present_runtimes(job: Callable[[Control], tuple[Runtime, ...]], *, as_json: bool) -> None:
    from vmprovision.cli.text import show_runtimes

    runtimes = work(job, as_json=as_json)
    present(
        {"runtimes": [runtime.as_json() for runtime in runtimes]},
        lambda: show_runtimes(STDOUT, runtimes),
        as_json=as_json,
    )
