"""``vmprovision serve``: virtual machines by HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmprovision import errors
from vmprovision.cli.console import STDERR
from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import fail, present, work

if TYPE_CHECKING:
    from vmprovision import Control
    from vmprovision.server.settings import ServerSettings


def serve(  # noqa: PLR0913 -- one parameter for each option
    *,
    listen: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="Where clients connect: HOST:PORT or unix:/PATH. Any other host than loopback "
            "needs --token-file.",
        ),
    ] = "127.0.0.1:8080",
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where templates, disks and consoles are kept; /var/lib/vmprovision for root.",
            show_default=False,
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The database: a file, or postgresql://USER@HOST/NAME; a file in --state, if "
            "left out.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="A libvirt host; qemu:///system, if left out. Can be repeated: a VM goes to the "
            "host with most free memory.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="NAME", help="The libvirt network of the VMs.")
    ] = "default",
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Where images of templates may be; the folder images in --state, if left out. "
            "Can be repeated.",
            show_default=False,
        ),
    ] = None,
    manager_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where agents report; the host's address in the network, if left out.",
            show_default=False,
        ),
    ] = None,
    report_port: Annotated[
        int, typer.Option(metavar="N", help="The port of that address in the network.")
    ] = 8080,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Who may ask: lines 'admin TOKEN' and 'read TOKEN'.",
            show_default=False,
        ),
    ] = None,
    open_reports: Annotated[
        bool, typer.Option("--open-reports", help="Take reports of agents that have no token.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A Dask scheduler whose workers do the injections.",
            show_default=False,
        ),
    ] = None,
    report_timeout: Annotated[
        float,
        typer.Option(metavar="S", help="How many seconds a started guest may take to report."),
    ] = 600.0,
    lease_seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=1.0,
            help="After so long without a sign of life another server takes over.",
        ),
    ] = 15.0,
    jobs: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="How many VMs are made at once.")
    ] = 2,
    as_json: JsonOption = False,
) -> None:
    """Create virtual machines over libvirt, with the agent in them, for clients of an HTTP API.

    The API is described at /docs. VMs run on when the server ends, and the next one
    finds them again. docs/serve.md has the whole picture.
    """
    _require_libraries(as_json=as_json)

    def settings() -> ServerSettings:
        from vmprovision.guest.configuration import check_manager_url
        from vmprovision.server.access import load_tokens
        from vmprovision.server.settings import (
            ServerSettings,
            database_url,
            default_state,
            parse_address,
        )

        folder = (state or default_state()).absolute()
        return ServerSettings(
            listen=parse_address(listen),
            state=folder,
            database=database_url(database, folder),
            hosts=tuple(host or ["qemu:///system"]),
            network=network,
            manager_url=check_manager_url(manager_url) if manager_url else None,
            report_port=report_port,
            tokens=load_tokens(token_file) if token_file else None,
            open_reports=open_reports,
            image_folders=tuple(path.absolute() for path in images or [folder / "images"]),
            scheduler=scheduler,
            report_seconds=report_timeout,
            lease_seconds=lease_seconds,
            builders=jobs,
        )

    wanted = work(lambda _: settings(), as_json=as_json)

    def run(control: Control) -> None:
        from vmprovision.server.run import serve as serve_until_cancelled

        def is_ready() -> None:
            where = f"{'' if wanted.listen.path else 'http://'}{wanted.listen}"
            present({"listen": where}, lambda: say_where(where), as_json=as_json)
            sys.stdout.flush()

        def say_where(where: str) -> None:
            STDERR.print(f"serving on {where}: a page, and the API, described at /docs")

        serve_until_cancelled(wanted, control=control, is_ready=is_ready)

    work(run, as_json=as_json)


def _require_libraries(*, as_json: bool) -> None:
    """End the program with the command that installs what the server needs, if it is missing."""
    from vmprovision.cli.extras import import_extra

    try:
        import_extra("vmprovision.server.run", "server")
    except errors.PlanError as exc:
        fail(exc, as_json=as_json)
