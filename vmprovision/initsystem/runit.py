"""runit: a service directory, and a link to it in the runlevel ``default``.

runsv(8), runsvdir(8), runsvchdir(8).  The link goes into ``/etc/runit/runsvdir/default``
itself.  ``/var/service`` and ``/etc/service`` are links of the running system, by way of
``runsvdir/current``, and lead elsewhere while a guest is off.
"""

from __future__ import annotations

from dataclasses import replace
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

# Debian and Void keep service directories in one place, Artix in another.
SERVICES = {"usual": PurePosixPath("/etc/sv"), "artix": PurePosixPath("/etc/runit/sv")}
RUNLEVEL = PurePosixPath("/etc/runit/runsvdir/default")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if runit is process 1 and has the runlevel that it starts."""
    status = status_of(reader, RUNLEVEL)
    if pid1.program != "runit" or status is None or status.kind != "directory":
        return None
    return Evidence((f"{pid1.path} is runit, and {RUNLEVEL} is there",))


def complete(reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the place of service directories."""
    is_artix = status_of(reader, SERVICES["artix"]) is not None
    return replace(verdict, dialect="artix" if is_artix else "usual")


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the program for runsv, the link to its state, and last the link that starts it."""
    folder = SERVICES[verdict.dialect or "usual"] / service.name
    return [
        WriteFile(
            path=folder / "run", content=render("shared/run.j2", service=service), mode=0o755
        ),
        # runsv keeps its state there, because /etc may be read-only
        Symlink(path=folder / "supervise", target=f"/run/runit/supervise.{service.name}"),
        Symlink(path=RUNLEVEL / service.name, target=str(folder)),
    ]


def _variant(dialect: str, *files: tuple[str, ...]) -> Variant:
    return Variant(
        dialect=dialect,
        # runsv also runs services under another init
        supervisor=Supervisor(allows_systemd=True, parents=("runsv",)),
        live=Live(
            processes=("runit",),
            files=files,
            start=(f"sv restart {NAME}",),
            stop=(f"sv force-stop {NAME}",),
        ),
    )


DEFINITION = Definition(
    name="runit",
    variants=(_variant("artix", (str(SERVICES["artix"]),)), _variant("usual")),
    markers=Markers(
        programs=("/sbin/runit-init", "/usr/bin/runit-init", "/lib/runit/runit-init"),
        folders=(str(RUNLEVEL),),
    ),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
