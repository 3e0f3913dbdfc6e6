"""``vmprovision doctor``: whether this host can do the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import present, stdout, work
from vmprovision.errors import VmprovisionError

if TYPE_CHECKING:
    from vmprovision import Control
    from vmprovision.doctor import Finding


def doctor(*, as_json: JsonOption = False) -> None:
    """Check whether this host can do the work; name the command that fixes what it lacks."""
    from vmprovision.cli.text import show_findings

    def examined(_: Control) -> list[Finding]:
        from vmprovision.doctor import examine_host

        return examine_host()

    findings = work(examined, as_json=as_json)
    is_able = all(finding.ok or not finding.needed for finding in findings)
    present(
        {"ok": is_able, "findings": [finding.as_json() for finding in findings]},
        lambda: show_findings(stdout(), findings),
        as_json=as_json,
    )
    if not is_able:
        raise typer.Exit(VmprovisionError.exit_code)
