"""The fallback: a block of lines in ``rc.local``, for an init that nobody knows.

The file may be left over: that it is there counts only where something that runs at
boot names it, or nothing of another init system is in the guest.  An unknown init
cannot be asked to respawn anything, so a loop in the script does.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import EditBlock, Operation
from vmprovision.filesystem.protocol import follow, read_text, resolved_file
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "standalone"

RC_LOCAL = ("/etc/rc.d/rc.local", "/etc/rc.local")
# PID 1 programs of which nobody else's module is the right answer, sysvinit's inittab
# included.  A bare shell is none of them: it runs nothing at boot.
UNCLAIMED = ("unknown", "script", "toybox", "minit", "sysvinit")
# What may run at boot and run rc.local in turn, beside process 1 itself.
CALLERS = ("/etc/inittab", "/etc/init.d/rcS", "/etc/rc", "/etc/rc.d/rc", "/etc/rc.multi")
PROGRAM_LIMIT = 8 << 20
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", PurePosixPath(RC_LOCAL[-1])),)
EXECUTABLE = 0o111
_HOOK = re.compile(r"/rc\.local\b")
TRACES = Traces(files=RC_LOCAL)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """An init that nobody knows, in a guest that has an rc.local; sysvinit has to name it."""
    if pid1.program not in UNCLAIMED:
        return None
    hook = _hook(reader)
    if hook is None:
        return None
    caller = find_caller(reader, pid1)
    if caller is None and pid1.program == "sysvinit":
        return None
    called = f", and {caller} names it" if caller else " for commands to run at boot"
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="likely",
        evidence=(*pid1.evidence, f"{hook} is there{called}"),
        hook=hook,
    )


def find_caller(reader: GuestReader, pid1: Pid1) -> PurePosixPath | None:
    """The file that names rc.local outside its comments."""
    if pid1.path:
        program = reader.read(pid1.path, limit=PROGRAM_LIMIT)
        script = program.startswith(b"#!")
        if _names_hook(program.decode("latin-1")) if script else b"/rc.local" in program:
            return pid1.path
    for path in (PurePosixPath(name) for name in CALLERS):
        if _names_hook(read_text(reader, path) or ""):
            return path
    return None


def _names_hook(text: str) -> bool:
    return any(_HOOK.search(line) for line in without_comments(text))


def _hook(reader: GuestReader) -> PurePosixPath | None:
    """The rc.local that is there."""
    found = (resolved_file(reader, path) for path in RC_LOCAL)
    return next((path for path in found if path), None)


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller wants the fallback: rc.local, made where it is missing."""
    made = PurePosixPath(RC_LOCAL[-1])
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named standalone", *pid1.evidence),
        hook=_hook(reader) or follow(reader, made) or made,
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
            before="exit",
            prologue=b"#!/bin/sh\n",
            mode=EXECUTABLE,
        )
    ]
