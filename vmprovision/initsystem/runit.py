"""runit: a service directory, and a link to it in the runlevel ``default``.

runsv(8), runsvdir(8), runsvchdir(8).  The link goes into ``/etc/runit/runsvdir/default``
itself: ``/var/service`` and ``/etc/service`` are links of the running system, by way of
``runsvdir/current``, and lead elsewhere while a guest is off.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import status_of
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "runit"

# where service directories stand: Debian and Void have one place, Artix another
SERVICES = {"usual": PurePosixPath("/etc/sv"), "artix": PurePosixPath("/etc/runit/sv")}
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = tuple((name, None) for name in SERVICES)
RUNLEVEL = PurePosixPath("/etc/runit/runsvdir/default")
TRACES = Traces(
    programs=("/sbin/runit-init", "/usr/bin/runit-init", "/lib/runit/runit-init"),
    folders=(str(RUNLEVEL),),
)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Runit is PID 1, and has the runlevel that it starts."""
    status = status_of(reader, RUNLEVEL)
    if pid1.program != "runit" or status is None or status.kind != "directory":
        return None
    return InitVerdict(
        system=NAME,
        pid1="runit",
        confidence="certain",
        evidence=(*pid1.evidence, f"{pid1.path} is runit, and {RUNLEVEL} is there"),
        dialect=_dialect(reader),
    )


def _dialect(reader: GuestReader) -> str:
    return "artix" if status_of(reader, SERVICES["artix"]) is not None else "usual"


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that runit runs the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named runit", *pid1.evidence),
        dialect=_dialect(reader),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as runit's service; None where nothing does."""
    parent = running.get("parent")
    name = parent.get("comm") if isinstance(parent, dict) else None
    return None if name == "runsv" else f"its parent is not runsv but {parent!r:.120}"


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The program that runsv runs, its state's place, and last the link that starts it."""
    folder = SERVICES[verdict.dialect or "usual"] / service.name
    return [
        WriteFile(path=folder / "run", content=render("runit/run.j2", service=service), mode=0o755),
        # runsv makes it there: /etc may be read-only
        Symlink(path=folder / "supervise", target=f"/run/runit/supervise.{service.name}"),
        Symlink(path=RUNLEVEL / service.name, target=str(folder)),
    ]
