"""OpenRC: a service script and its link in the runlevel ``default``.

openrc-run(8), supervise-daemon(8).  Releases before 0.13 (Alpine up to 3.1, older
Gentoo) call the scripts' interpreter ``runscript``, and before 0.21 none of OpenRC's
own programs watches over a service.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.inittab import (
    OPENRC,
    names_openrc,
    read_inittab,
    starts_openrc,
)
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Confidence, Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "openrc"

# supervised by supervise-daemon, by a loop of our own, and that under the old name
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (
    ("supervise-daemon", None),
    ("openrc-run", None),
    ("runscript", None),
)
SCRIPTS = PurePosixPath("/etc/init.d")
RUNLEVEL = PurePosixPath("/etc/runlevels/default")
# Debian's inittab runs this one, whoever provides it.
WRAPPER = "/etc/init.d/rc"
SUPERVISORS = ("/sbin/supervise-daemon", "/usr/sbin/supervise-daemon", "/usr/bin/supervise-daemon")
# old OpenRC may stand without its interpreter's new name
OPENRC_RUN = "/sbin/openrc-run"
RUNSCRIPT = "/sbin/runscript"
HEAD_LIMIT = 100
SCRIPTS_LOOKED_AT = 50
TRACES = Traces(
    programs=(*OPENRC, "/sbin/openrc-init", "/usr/bin/openrc-init"),
    folders=(str(RUNLEVEL),),
)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """OpenRC's own init is PID 1; or sysvinit's or BusyBox's, and its inittab starts OpenRC."""
    found = _why(reader, pid1)
    if found is None:
        return None
    why, confidence = found
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence=confidence,
        evidence=(*pid1.evidence, why),
        dialect=_dialect(reader),
    )


def _why(reader: GuestReader, pid1: Pid1) -> tuple[str, Confidence] | None:
    if pid1.program == "openrc-init":
        return f"{pid1.path} is OpenRC's own init", "certain"
    if pid1.program not in ("sysvinit", "busybox"):
        return None
    inittab = read_inittab(reader)
    if starts_openrc(reader, inittab):
        return "/etc/inittab starts OpenRC", "certain"
    if WRAPPER in inittab and names_openrc(read_text(reader, PurePosixPath(WRAPPER)) or ""):
        return f"/etc/inittab runs {WRAPPER}, and that starts OpenRC", "certain"
    # Alpine's minimal root has that inittab too, and neither OpenRC nor services of it
    if names_openrc(inittab) and reader.list_directory(RUNLEVEL):
        return f"/etc/inittab names OpenRC, and {RUNLEVEL} has services of it", "likely"
    return None


def _dialect(reader: GuestReader) -> str:
    if any(resolved_file(reader, path) for path in SUPERVISORS):
        return "supervise-daemon"
    if resolved_file(reader, OPENRC_RUN):
        return "openrc-run"
    old = resolved_file(reader, RUNSCRIPT) is not None or _uses_runscript(reader)
    return "runscript" if old else "openrc-run"


def _uses_runscript(reader: GuestReader) -> bool:
    """Whether the guest's own scripts are for the interpreter's old name."""
    for name in reader.list_directory(RUNLEVEL)[:SCRIPTS_LOOKED_AT]:
        first = (read_text(reader, RUNLEVEL / name, HEAD_LIMIT) or "").split("\n", 1)[0]
        if first.startswith("#!"):
            return "runscript" in first
    return False


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that OpenRC runs the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named openrc", *pid1.evidence),
        dialect=_dialect(reader),
    )


def running_fault(running: Mapping[str, Any], verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as OpenRC's service; None where nothing does."""
    if running.get("pid1") == "systemd":
        return "process 1 is systemd"
    parent = running.get("parent")
    name = str(parent.get("comm")) if isinstance(parent, dict) else ""
    # the kernel keeps fifteen characters
    if verdict.dialect == "supervise-daemon" and not name.startswith("supervise-daem"):
        return f"its parent is not supervise-daemon but {parent!r:.120}"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The script, and last its link in the runlevel."""
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
