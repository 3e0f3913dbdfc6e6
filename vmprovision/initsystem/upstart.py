"""Upstart: one job file, which is enabled by being there.

init(5) of Upstart.  Nothing newer than 0.6 is used, so that every release reads it:
``setuid`` and ``console log`` came with 1.4, and the agent needs neither.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, WriteFile
from vmprovision.filesystem.protocol import status_of
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "upstart"

VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", None),)
JOBS = PurePosixPath("/etc/init")
REDHAT_SCRIPTS = PurePosixPath("/etc/rc.d/init.d")
TRACES = Traces(programs=("/sbin/upstart",), folders=(str(JOBS),))


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Upstart is PID 1 and has jobs of its own; Red Hat's, which has not, is sysv's to claim."""
    if pid1.program != "upstart" or status_of(reader, REDHAT_SCRIPTS) is not None:
        return None
    jobs = [name for name in reader.list_directory(JOBS) if name.endswith(".conf")]
    if not jobs:
        return None
    return InitVerdict(
        system=NAME,
        pid1="upstart",
        confidence="certain",
        evidence=(*pid1.evidence, f"{JOBS} holds {len(jobs)} jobs"),
    )


def told(_reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that Upstart runs the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named upstart", *pid1.evidence),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as Upstart's job; None where nothing does."""
    if running.get("pid1") != "init":
        return f"process 1 is {running.get('pid1')!r:.80}"
    parent = running.get("parent")
    if not isinstance(parent, dict) or parent.get("pid") != 1:
        return f"its parent is not process 1 but {parent!r:.120}"
    return None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """The job."""
    return [
        WriteFile(
            path=JOBS / f"{service.name}.conf",
            content=render("upstart/guest-agent.conf.j2", service=service),
        )
    ]
