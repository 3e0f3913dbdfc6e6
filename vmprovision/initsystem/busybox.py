"""BusyBox's init, as in Buildroot and other small systems: a line in its inittab or ``rcS``.

It reads ``/etc/inittab`` in its own dialect (``examples/inittab`` in its source:
``null::respawn:`` restarts a program and gives it no console). Without that file it
runs the script ``/etc/init.d/rcS``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import EditBlock, Operation
from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import resolved_file
from vmprovision.initsystem.bootscript import loop_in_script
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

INITTAB = PurePosixPath("/etc/inittab")
RCS = PurePosixPath("/etc/init.d/rcS")
RELOAD = ("kill -HUP 1",)
VARIANTS = (
    Variant(
        hook=INITTAB,
        supervisor=Supervisor(parents=(1,)),
        live=Live(
            processes=("busybox",), files=((str(INITTAB),),), start=RELOAD, afterwards=RELOAD
        ),
    ),
    Variant(dialect="rcS", hook=RCS),
)


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if BusyBox is process 1; OpenRC, which it may start, is tried first."""
    found = _find_hook(reader) if pid1.program == "busybox" else None
    if found is None:
        return None
    return Evidence((f"{pid1.path} is BusyBox, and its init runs what {found[1]} says",))


def complete(reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the file that BusyBox's init reads.

    Raises:
        InspectionError: neither file exists.
    """
    found = _find_hook(reader)
    if found is None:
        raise InspectionError(
            f"the guest's BusyBox init has neither {INITTAB} nor {RCS}",
            hint="create one of them in the guest: BusyBox runs nothing else at boot",
        )
    variant, hook = found
    return replace(verdict, hook=hook, dialect=variant.dialect)


def _find_hook(reader: GuestReader) -> tuple[Variant, PurePosixPath] | None:
    for variant in VARIANTS:
        real = resolved_file(reader, str(variant.hook))
        if real:
            return variant, real
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the block of lines for the file that the init reads."""
    if verdict.dialect == "rcS":
        return [loop_in_script(verdict.hook or RCS, service)]
    return [
        EditBlock(
            path=verdict.hook or INITTAB,
            name=service.name,
            content=render("busybox/inittab.j2", service=service),
        )
    ]


DEFINITION = Definition(
    name="busybox",
    variants=VARIANTS,
    markers=Markers(programs=("/bin/busybox",), files=(str(RCS),)),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
