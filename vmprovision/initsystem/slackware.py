"""Slackware's BSD-style boot: a script in ``/etc/rc.d``, called from ``rc.local``.

inittab(5), and the comments in ``/etc/rc.d/rc.M`` and ``rc.6``: ``rc.M`` runs ``rc.local``
last, and shutdown runs ``rc.local_shutdown`` first, each where it is executable.  The
script is SysV's own; whether it is executable says whether it is enabled.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import EditBlock, Operation, WriteFile
from vmprovision.filesystem.protocol import resolved_file
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.inittab import read_inittab
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "slackware"
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", None),)
SCRIPTS = PurePosixPath("/etc/rc.d")
MULTI_USER = "/etc/rc.d/rc.M"
EXECUTABLE = 0o111
TRACES = Traces(files=(MULTI_USER,))


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Sysvinit is PID 1, and its inittab runs ``rc.M``."""
    if pid1.program != "sysvinit" or MULTI_USER not in read_inittab(reader):
        return None
    if resolved_file(reader, MULTI_USER) is None:
        return None
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="certain",
        evidence=(*pid1.evidence, f"/etc/inittab runs {MULTI_USER}, which is there"),
    )


def told(_reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that Slackware's scripts run the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named slackware", *pid1.evidence),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent having been started by the script; None: nothing does."""
    if running.get("pid1") == "systemd":
        return "process 1 is systemd"
    parent = running.get("parent")
    name = parent.get("comm") if isinstance(parent, dict) else None
    if name != "rc.guest-agent":
        return f"its parent is not the script's loop but {parent!r:.120}"
    return None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """The script, the line that stops it, and last the line that starts it."""
    script = SCRIPTS / f"rc.{service.name}"
    return [
        WriteFile(path=script, content=render("sysv/guest-agent.j2", service=service), mode=0o755),
        *(
            EditBlock(
                path=SCRIPTS / name,
                name=service.name,
                content=render("slackware/rc.local.j2", script=script, action=action),
                before="exit",
                prologue=b"#!/bin/sh\n",
                mode=EXECUTABLE,
            )
            for name, action in (("rc.local_shutdown", "stop"), ("rc.local", "start"))
        ),
    ]
