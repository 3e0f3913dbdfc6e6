"""``vmprovision doctor``: whether this host can do the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import present, work
from vmprovision.errors import PlanError, VmprovisionError

if TYPE_CHECKING:
    from vmprovision import Control
    from vmprovision.doctor import Finding


def doctor(
    *,
    server: Annotated[
        bool, typer.Option("--server", help="Also check what `vmprovision serve` needs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check whether this host can do the work; name the command that fixes what it lacks."""
    from vmprovision.cli.text import show_findings

    def examined(_: Control) -> list[Finding]:
        from vmprovision.doctor import examine_host

        return [*examine_host(), *(_examined_server() if server else ())]

    findings = work(examined, as_json=as_json)
    is_able = all(finding.ok or not finding.needed for finding in findings)
    present(
        {"ok": is_able, "findings": [finding.as_json() for finding in findings]},
        lambda: show_findings(STDOUT, findings),
        as_json=as_json,
    )
    if not is_able:
        raise typer.Exit(VmprovisionError.exit_code)


def _examined_server() -> list[Finding]:
    """Return what the server lacks; its libraries are an extra."""
    from vmprovision.cli.extras import import_extra
    from vmprovision.doctor import Finding

    try:
        import_extra("vmprovision.server.run", "server")
    except PlanError as exc:
        return [Finding(subject="server", ok=False, detail=exc.message, fix=exc.hint)]
    from vmprovision.server.doctor import examine_server

    return examine_server()
