"""Finit: a service line in a file of its own, and the link that enables it.

finit.conf(5); ``initctl enable`` makes the same link.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import status_of
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

SNIPPETS = PurePosixPath("/etc/finit.d")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if finit is process 1; it always reads ``/etc/finit.d``."""
    if pid1.program != "finit":
        return None
    is_there = status_of(reader, SNIPPETS) is not None
    return Evidence(
        (
            f"{pid1.path} is finit",
            *((f"{SNIPPETS} is there for services",) if is_there else ()),
        )
    )


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """Return the service's file, and last the link that enables it."""
    name = f"{service.name}.conf"
    return [
        WriteFile(
            path=SNIPPETS / "available" / name,
            content=render("finit/guest-agent.conf.j2", service=service),
        ),
        Symlink(path=SNIPPETS / "enabled" / name, target=f"../available/{name}"),
    ]


DEFINITION = Definition(
    name="finit",
    variants=(
        Variant(
            supervisor=Supervisor(parents=(1,)),
            live=Live(
                processes=("finit",),
                start=("initctl reload", f"initctl restart {NAME}"),
                stop=(f"initctl stop {NAME}",),
                afterwards=("initctl reload",),
            ),
        ),
    ),
    markers=Markers(
        programs=("/sbin/finit", "/usr/sbin/finit"),
        files=("/etc/finit.conf",),
        folders=(str(SNIPPETS / "enabled"),),
    ),
    detect=detect,
    service_operations=service_operations,
)
