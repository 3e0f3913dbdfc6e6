"""Slackware's BSD-style boot: a script in ``/etc/rc.d``, called from ``rc.local``.

inittab(5), and the comments in ``/etc/rc.d/rc.M`` and ``rc.6``: ``rc.M`` runs ``rc.local``
last, and shutdown runs ``rc.local_shutdown`` first, each if it is executable.  The
script is the same as for SysV.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, WriteFile
from vmprovision.filesystem.protocol import resolved_file
from vmprovision.initsystem.bootscript import block_in_script
from vmprovision.initsystem.definition import Definition, Evidence, Supervisor, Variant
from vmprovision.initsystem.inittab import read_inittab
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

SCRIPTS = PurePosixPath("/etc/rc.d")
MULTI_USER = "/etc/rc.d/rc.M"


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if sysvinit is process 1 and its inittab runs ``rc.M``."""
    if pid1.program != "sysvinit" or MULTI_USER not in read_inittab(reader):
        return None
    if resolved_file(reader, MULTI_USER) is None:
        return None
    return Evidence((f"/etc/inittab runs {MULTI_USER}, which is there",))


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """Return the script, the line that stops it, and last the line that starts it."""
    script = SCRIPTS / f"rc.{service.name}"
    return [
        WriteFile(path=script, content=render("sysv/guest-agent.j2", service=service), mode=0o755),
        *(
            block_in_script(
                SCRIPTS / name,
                service,
                render("slackware/rc.local.j2", script=script, action=action),
            )
            for name, action in (("rc.local_shutdown", "stop"), ("rc.local", "start"))
        ),
    ]


DEFINITION = Definition(
    name="slackware",
    variants=(Variant(supervisor=Supervisor(parents=(f"rc.{NAME}",))),),  # the script's loop
    markers=Markers(files=(MULTI_USER,)),
    detect=detect,
    service_operations=service_operations,
)
