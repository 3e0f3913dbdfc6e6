"""The fallback: a block of lines in the one file through which boot starts commands.

BusyBox's init has ``/etc/inittab`` (``null::respawn:``, BusyBox's own dialect:
examples/inittab in its source) or the script ``/etc/init.d/rcS``; others have
``rc.local``.  Where the init cannot respawn, a loop in the script does.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.errors import InspectionError
from vmprovision.filesystem import read_text, resolve, resolved_file
from vmprovision.guest import InitSystem, InitVerdict
from vmprovision.plan import EditBlock, Operation
from vmprovision.rendering import render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem import GuestReader
    from vmprovision.guest import Pid1
    from vmprovision.rendering import Service

NAME: InitSystem = "standalone"

INITTAB = "/etc/inittab"
RCS = "/etc/init.d/rcS"
OPENRC = ("/sbin/openrc", "/usr/bin/openrc", "/sbin/rc")
RC_LOCAL = ("/etc/rc.d/rc.local", "/etc/rc.local")
# PID 1 programs of which nobody else's module is the right answer.
UNCLAIMED = ("unknown", "script", "shell", "toybox", "minit")
HOOKS: tuple[PurePosixPath | None, ...] = (PurePosixPath(INITTAB), PurePosixPath(RC_LOCAL[-1]))
EXECUTABLE = 0o111


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """BusyBox is PID 1 and runs services itself, or an init that nobody knows runs rc.local."""
    if pid1.program == "busybox":
        return _detect_busybox(reader, pid1)
    if pid1.program not in UNCLAIMED:
        return None
    for path in RC_LOCAL:
        if hook := resolved_file(reader, path):
            return InitVerdict(
                system=NAME,
                pid1=pid1.program,
                confidence="likely",
                evidence=(*pid1.evidence, f"{hook} is there for commands to run at boot"),
                hook=hook,
            )
    return None


def _detect_busybox(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    inittab = read_text(reader, PurePosixPath(INITTAB))
    if inittab is not None and _hands_over_to_openrc(reader, inittab):
        return None
    for path in (INITTAB, RCS):
        if hook := resolved_file(reader, path):
            return InitVerdict(
                system=NAME,
                pid1="busybox",
                confidence="certain",
                evidence=(
                    *pid1.evidence,
                    f"{pid1.path} is BusyBox, and its init runs what {hook} says",
                ),
                hook=hook,
            )
    return None


def _hands_over_to_openrc(reader: GuestReader, inittab: str) -> bool:
    """Whether an inittab names OpenRC, and OpenRC is really there.

    Alpine's minimal root filesystem has the inittab and not the program.
    """
    if not re.search(r"(?m)^[^#\n]*(?:\bopenrc\b|/sbin/rc\b)", inittab):
        return False
    return any(resolved_file(reader, path) for path in OPENRC)


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller wants the fallback: BusyBox's own files, else rc.local, made where it is missing.

    Raises:
        InspectionError: the guest is BusyBox's and has no file that its init reads.
    """
    found = detect(reader, pid1)
    if found is None and pid1.program == "busybox" and not resolved_file(reader, INITTAB):
        raise InspectionError(
            f"the guest's BusyBox init has neither {INITTAB} nor {RCS}",
            hint="give it one of them: nothing else runs at its boot",
        )
    hook = found.hook if found else None
    candidates = (INITTAB,) if pid1.program == "busybox" else RC_LOCAL
    hook = hook or next(
        (real for path in candidates if (real := resolved_file(reader, path))), None
    )
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named standalone", *pid1.evidence),
        hook=hook or resolve(reader, PurePosixPath(RC_LOCAL[-1])),
    )


def running_fault(running: Mapping[str, Any], verdict: InitVerdict) -> str | None:
    """What speaks against the agent having been started through the hook; None: nothing does."""
    parent = running.get("parent")
    number = parent.get("pid") if isinstance(parent, dict) else None
    inittab = verdict.hook is not None and verdict.hook.name == "inittab"
    if inittab and number != 1:
        return f"its parent is not process 1 but {parent!r:.120}"
    if str(running.get("cgroup")).endswith("/guest-agent.service"):
        return "it runs as a systemd service"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The one block, in the file that the verdict found."""
    hook = verdict.hook or PurePosixPath(RC_LOCAL[-1])
    if hook.name == "inittab":
        return [
            EditBlock(
                path=hook,
                name=service.name,
                content=render("standalone/inittab.j2", service=service),
            )
        ]
    return [
        EditBlock(
            path=hook,
            name=service.name,
            content=render("standalone/rc.local.j2", service=service),
            before="exit 0",
            prologue=b"#!/bin/sh\n",
            mode=EXECUTABLE,
        )
    ]
