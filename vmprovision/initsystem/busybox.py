"""BusyBox's init, as in Buildroot's and other small systems.

It runs what ``/etc/inittab`` says, in BusyBox's own dialect (examples/inittab in
its source: ``null::respawn:`` starts a program again and gives it no console), or,
without that file, the script ``/etc/init.d/rcS``.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import EditBlock, Operation
from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import resolved_file
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "busybox"

INITTAB = PurePosixPath("/etc/inittab")
RCS = PurePosixPath("/etc/init.d/rcS")
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", INITTAB), ("", RCS))
EXECUTABLE = 0o111
TRACES = Traces(programs=("/bin/busybox",), files=(str(RCS),))


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """BusyBox is PID 1; where its inittab starts OpenRC, that has been asked before."""
    if pid1.program != "busybox":
        return None
    hook = _hook(reader)
    if hook is None:
        return None
    return InitVerdict(
        system=NAME,
        pid1="busybox",
        confidence="certain",
        evidence=(*pid1.evidence, f"{pid1.path} is BusyBox, and its init runs what {hook} says"),
        hook=hook,
    )


def _hook(reader: GuestReader) -> PurePosixPath | None:
    """The file that the init reads."""
    found = (resolved_file(reader, str(path)) for path in (INITTAB, RCS))
    return next((path for path in found if path), None)


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that BusyBox's init runs the services.

    Raises:
        InspectionError: there is no file that it would read.
    """
    hook = _hook(reader)
    if hook is None:
        raise InspectionError(
            f"the guest's BusyBox init has neither {INITTAB} nor {RCS}",
            hint="give it one of them: nothing else runs at its boot",
        )
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named busybox", *pid1.evidence),
        hook=hook,
    )


def running_fault(running: Mapping[str, Any], verdict: InitVerdict) -> str | None:
    """What speaks against the agent having been started by BusyBox; None where nothing does."""
    parent = running.get("parent")
    number = parent.get("pid") if isinstance(parent, dict) else None
    inittab = verdict.hook is not None and verdict.hook.name == INITTAB.name
    if inittab and number != 1:
        return f"its parent is not process 1 but {parent!r:.120}"
    if running.get("pid1") == "systemd":
        return "process 1 is systemd"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The one block, in the file that the verdict found."""
    hook = verdict.hook or INITTAB
    template = "inittab" if hook.name == INITTAB.name else "rcS"
    content = render(f"busybox/{template}.j2", service=service)
    if template == "inittab":
        return [EditBlock(path=hook, name=service.name, content=content)]
    return [
        EditBlock(
            path=hook,
            name=service.name,
            content=content,
            before="exit",
            prologue=b"#!/bin/sh\n",
            mode=EXECUTABLE,
        )
    ]
