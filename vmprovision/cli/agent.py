"""Commands about the agent itself: its one file, and the files of its service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmprovision.cli.commands import App
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import JsonOption, PortOption
from vmprovision.cli.running import fail, present, work
from vmprovision.errors import ImageError
from vmprovision.guest.names import INIT_SYSTEMS

if TYPE_CHECKING:
    from vmprovision import Control
    from vmprovision.changes.operations import Operation
    from vmprovision.runtime.archive import Archive

app = App(help="The guest agent by itself.")


@app.command("build")
def build(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")
    ] = Path("guest-agent"),
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH",
            help="Put the bundled runtime for ARCH into the file, which then runs on any Linux "
            "of that architecture, with or without Python.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the agent as one file, to copy into a machine and run there.

    The file finds a Python by itself, or needs none. The same source always gives
    the same bytes.
    """
    archive = work(lambda _: _build(runtime), as_json=as_json)
    try:
        _write(output, archive)
    except OSError as exc:
        fail(ImageError(f"{output} cannot be written: {exc.strerror}"), as_json=as_json)
    document = {
        "path": str(output),
        "version": archive.version,
        "size": len(archive.content),
        "sha256": archive.sha256,
    }
    summary = f"{output}: agent {archive.version}, {len(archive.content)} bytes"
    present(document, lambda: STDOUT.print(summary), as_json=as_json)


def _build(architecture: str | None) -> Archive:
    from vmprovision.runtime.archive import build_archive
    from vmprovision.runtime.store import architecture_named, find_runtime, load

    if architecture is None:
        return build_archive()
    return build_archive(load(find_runtime(architecture_named(architecture))))


def _write(output: Path, archive: Archive) -> None:
    from vmprovision.host.cache import write_atomically

    write_atomically(output.absolute(), archive.content)
    output.chmod(0o755)


def render(
    init: Annotated[
        str, typer.Argument(metavar="INIT", help="One of " + ", ".join(INIT_SYSTEMS) + ".")
    ],
    *,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the files that the agent's service has under an init system."""
    from vmprovision.cli.text import show_service

    def rendered(_: Control) -> list[tuple[Operation, bytes]]:
        from vmprovision.planning.injection import render_service

        return render_service(init, port)

    operations = work(rendered, as_json=as_json)
    document = {
        "init": init,
        "files": [
            {"path": str(operation.path), "content": content.decode()}
            for operation, content in operations
        ],
    }
    present(document, lambda: show_service(STDOUT, operations), as_json=as_json)
