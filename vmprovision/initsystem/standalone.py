"""The fallback: a block of lines in ``rc.local``, for an init that nobody knows.

It cannot be asked to respawn anything, so a loop in the script does.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.filesystem import resolve, resolved_file
from vmprovision.guest import InitSystem, InitVerdict
from vmprovision.plan import EditBlock, Operation
from vmprovision.rendering import render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem import GuestReader
    from vmprovision.guest import Pid1
    from vmprovision.rendering import Service

NAME: InitSystem = "standalone"

RC_LOCAL = ("/etc/rc.d/rc.local", "/etc/rc.local")
# PID 1 programs of which nobody else's module is the right answer.
# A bare shell is none of them: it runs nothing at boot.
UNCLAIMED = ("unknown", "script", "toybox", "minit")
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", PurePosixPath(RC_LOCAL[-1])),)
EXECUTABLE = 0o111


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """An init that nobody knows, in a guest that has an rc.local."""
    if pid1.program not in UNCLAIMED:
        return None
    hook = _hook(reader)
    if hook is None:
        return None
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="likely",
        evidence=(*pid1.evidence, f"{hook} is there for commands to run at boot"),
        hook=hook,
    )


def _hook(reader: GuestReader) -> PurePosixPath | None:
    """The rc.local that is there."""
    found = (resolved_file(reader, path) for path in RC_LOCAL)
    return next((path for path in found if path), None)


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller wants the fallback: rc.local, made where it is missing."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named standalone", *pid1.evidence),
        hook=_hook(reader) or resolve(reader, PurePosixPath(RC_LOCAL[-1])),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent having been started through rc.local; None: nothing does."""
    if str(running.get("cgroup")).endswith("/guest-agent.service"):
        return "it runs as a systemd service"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The one block, in the file that the verdict found."""
    return [
        EditBlock(
            path=verdict.hook or PurePosixPath(RC_LOCAL[-1]),
            name=service.name,
            content=render("standalone/rc.local.j2", service=service),
            before="exit 0",
            prologue=b"#!/bin/sh\n",
            mode=EXECUTABLE,
        )
    ]
