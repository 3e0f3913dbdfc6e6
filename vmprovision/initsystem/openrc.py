"""OpenRC: a service script and its link in the runlevel ``default``.

openrc-run(8), supervise-daemon(8).  Releases before 0.13 (Alpine up to 3.1, older
Gentoo) call the scripts' interpreter ``runscript``.  Before 0.21 OpenRC has no program
that supervises a service.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.inittab import (
    OPENRC,
    names_openrc,
    read_inittab,
    starts_openrc,
)
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

SCRIPTS = PurePosixPath("/etc/init.d")
RUNLEVEL = PurePosixPath("/etc/runlevels/default")
# Debian's inittab runs this script; either OpenRC or sysv-rc provides it.
WRAPPER = "/etc/init.d/rc"
SUPERVISORS = ("/sbin/supervise-daemon", "/usr/sbin/supervise-daemon", "/usr/bin/supervise-daemon")
# the interpreter of the scripts, and its name in old releases
OPENRC_RUN = "/sbin/openrc-run"
RUNSCRIPT = "/sbin/runscript"
HEAD_LIMIT = 100
SCRIPTS_LOOKED_AT = 50


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if process 1 is OpenRC's own init, or its inittab starts OpenRC."""
    if pid1.program == "openrc-init":
        return Evidence((f"{pid1.path} is OpenRC's own init",))
    if pid1.program not in ("sysvinit", "busybox"):
        return None
    inittab = read_inittab(reader)
    if starts_openrc(reader, inittab):
        return Evidence(("/etc/inittab starts OpenRC",))
    if WRAPPER in inittab and names_openrc(read_text(reader, PurePosixPath(WRAPPER)) or ""):
        return Evidence((f"/etc/inittab runs {WRAPPER}, and that starts OpenRC",))
    # Alpine's minimal root has that inittab without OpenRC or its services
    if names_openrc(inittab) and reader.list_directory(RUNLEVEL):
        sentence = f"/etc/inittab names OpenRC, and {RUNLEVEL} has services of it"
        return Evidence((sentence,), "likely")
    return None


def complete(reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with this OpenRC's name for its interpreter, and its supervisor."""
    return replace(verdict, dialect=_dialect(reader))


def _dialect(reader: GuestReader) -> str:
    if any(resolved_file(reader, path) for path in SUPERVISORS):
        return "supervise-daemon"
    if resolved_file(reader, OPENRC_RUN):
        return "openrc-run"
    old = resolved_file(reader, RUNSCRIPT) is not None or _uses_runscript(reader)
    return "runscript" if old else "openrc-run"


def _uses_runscript(reader: GuestReader) -> bool:
    """Return whether the guest's own scripts use the interpreter's old name."""
    for name in reader.list_directory(RUNLEVEL)[:SCRIPTS_LOOKED_AT]:
        first = (read_text(reader, RUNLEVEL / name, HEAD_LIMIT) or "").split("\n", 1)[0]
        if first.startswith("#!"):
            return "runscript" in first
    return False


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the script, and last its link in the runlevel."""
    script = SCRIPTS / service.name
    content = render(
        "openrc/guest-agent.j2",
        service=service,
        interpreter=RUNSCRIPT if verdict.dialect == "runscript" else OPENRC_RUN,
        supervised=verdict.dialect == "supervise-daemon",
    )
    return [
        WriteFile(path=script, content=content, mode=0o755),
        Symlink(path=RUNLEVEL / service.name, target=str(script)),
    ]


STATE = ("/run/openrc", "/lib/rc/init.d/softlevel")  # a running OpenRC has one of these


def _live(*files: str) -> Live:
    return Live(
        files=(STATE, files) if files else (STATE,),
        start=(f"rc-service {NAME} restart",),
        stop=(f"rc-service {NAME} stop",),
    )


DEFINITION = Definition(
    name="openrc",
    variants=(
        Variant(
            dialect="supervise-daemon",
            supervisor=Supervisor(parents=("supervise-daemon",)),
            live=_live(*SUPERVISORS),
        ),
        # supervised by a loop in the script; then the same with the interpreter's old name
        Variant(dialect="openrc-run", live=_live(OPENRC_RUN)),
        Variant(dialect="runscript", live=_live()),
    ),
    markers=Markers(
        programs=(*OPENRC, "/sbin/openrc-init", "/usr/bin/openrc-init"),
        folders=(str(RUNLEVEL),),
    ),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
