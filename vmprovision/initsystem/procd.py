"""procd, OpenWrt's init: a script for ``/etc/rc.common``, and its links in ``/etc/rc.d``.

OpenWrt's "procd init scripts" guide and the comments of ``procd.sh``.  ``enable`` in
``rc.common`` makes the same links.  A root filesystem that is squashfs under an overlay
cannot be written offline; mounting such an image for writing fails.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import resolved_file
from vmprovision.initsystem.definition import Definition, Evidence, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

SCRIPTS = PurePosixPath("/etc/init.d")
LINKS = PurePosixPath("/etc/rc.d")
FRAMEWORK = "/etc/rc.common"


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if OpenWrt's init is process 1 and the framework for its scripts exists."""
    if pid1.program != "procd" or resolved_file(reader, FRAMEWORK) is None:
        return None
    return Evidence((f"{pid1.path} is procd's, and {FRAMEWORK} is there",))


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """Return the script, the link that stops it, and last the one that starts it."""
    return [
        WriteFile(
            path=SCRIPTS / service.name,
            content=render("procd/guest-agent.j2", service=service),
            mode=0o755,
        ),
        *(
            Symlink(path=LINKS / f"{order}{service.name}", target=f"../init.d/{service.name}")
            for order in ("K01", "S99")
        ),
    ]


DEFINITION = Definition(
    name="procd",
    variants=(Variant(supervisor=Supervisor(pid1="procd", parents=(1,))),),
    markers=Markers(programs=("/sbin/procd",), files=(FRAMEWORK,)),
    detect=detect,
    service_operations=service_operations,
)
