"""Upstart: one job file, which is enabled by being there.

init(5) of Upstart.  The job uses nothing newer than 0.6, so that every release reads it:
``setuid`` and ``console log`` came with 1.4, and the agent needs neither.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, WriteFile
from vmprovision.filesystem.protocol import status_of
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

JOBS = PurePosixPath("/etc/init")
REDHAT_SCRIPTS = PurePosixPath("/etc/rc.d/init.d")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if Upstart is process 1 and has jobs.

    Red Hat's Upstart runs SysV scripts and belongs to the module ``sysv``.
    """
    if pid1.program != "upstart" or status_of(reader, REDHAT_SCRIPTS) is not None:
        return None
    jobs = [name for name in reader.list_directory(JOBS) if name.endswith(".conf")]
    return Evidence((f"{JOBS} holds {len(jobs)} jobs",)) if jobs else None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """Return the job."""
    return [
        WriteFile(
            path=JOBS / f"{service.name}.conf",
            content=render("upstart/guest-agent.conf.j2", service=service),
        )
    ]


RELOAD = "initctl reload-configuration"
DEFINITION = Definition(
    name="upstart",
    variants=(
        Variant(
            supervisor=Supervisor(pid1="init", parents=(1,)),
            live=Live(
                processes=("upstart",),
                start=(RELOAD, f"initctl stop {NAME}", f"initctl start {NAME}"),
                stop=(f"initctl stop {NAME}",),
                afterwards=(RELOAD,),
            ),
        ),
    ),
    markers=Markers(programs=("/sbin/upstart",), folders=(str(JOBS),)),
    detect=detect,
    service_operations=service_operations,
)
