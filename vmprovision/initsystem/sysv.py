"""SysV runlevels: a script in ``init.d`` and its links, as Red Hat, Debian and SUSE have them.

LSB init scripts, chkconfig(8), insserv(8).  The script is the same; the folders are
not.  Debian's ``rc`` starts by the makefiles ``.depend.*`` that insserv makes, where
they are there, and ignores links that they do not name: startpar takes further
``TARGETS`` lines, so a block with one is added.  SUSE (init.d(7)) keeps the runlevels
below ``/etc/init.d``, uses 3 and 5 only, and has the links that stop a service in the
runlevel that is left; its ``rc`` reads the same makefiles.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import (
    EditBlock,
    Operation,
    Symlink,
    WriteFile,
)
from vmprovision.filesystem.protocol import read_text, resolved_file, status_of
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.inittab import read_inittab
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "sysv"

VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (
    ("redhat", None),
    ("debian", None),
    ("debian-startpar", None),
    ("suse", None),
    ("suse-startpar", None),
)
START_LEVELS, STOP_LEVELS = (2, 3, 4, 5), (0, 1, 6)
SUSE_LEVELS = (3, 5)
REDHAT_SCRIPTS = PurePosixPath("/etc/rc.d/init.d")
REDHAT_RC = "/etc/rc.d/rc"
REDHAT_JOB = "/etc/init/rc.conf"  # RHEL 6's Upstart runs the runlevels' scripts by it
DEBIAN_SCRIPTS = PurePosixPath("/etc/init.d")
DEPENDENCIES = (".depend.boot", ".depend.start", ".depend.stop")
LEGACY_ORDER = DEBIAN_SCRIPTS / ".legacy-bootordering"
STARTPAR = ("/bin/startpar", "/sbin/startpar", "/usr/bin/startpar", "/lib/startpar/startpar")
# Linux From Scratch has it in /etc/rc.d/init.d
_RUNS_RC = re.compile(r"(/etc/(?:rc\.d|init\.d|rc\.d/init\.d)/rc)\s+\d")
TRACES = Traces(
    programs=("/lib/sysvinit/init",),
    files=("/etc/inittab",),
    folders=("/etc/rc.d/rc3.d", "/etc/init.d/rc3.d", "/etc/rc2.d"),
)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Sysvinit's inittab runs the runlevels' scripts, or Red Hat's Upstart does."""
    why = _why(reader, pid1)
    if why is None:
        return None
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="certain",
        evidence=(*pid1.evidence, why),
        dialect=_dialect(reader),
    )


def _why(reader: GuestReader, pid1: Pid1) -> str | None:
    if pid1.program == "sysvinit":
        lines = without_comments(read_inittab(reader))
        match = next((found for line in lines if (found := _RUNS_RC.search(line))), None)
        return f"/etc/inittab runs {match[1]} for each runlevel" if match else None
    if pid1.program != "upstart" or not _is_redhat(reader):
        return None
    job = read_text(reader, PurePosixPath(REDHAT_JOB)) or ""
    if REDHAT_RC in job:
        return f"{REDHAT_JOB} runs {REDHAT_RC} for each runlevel"
    if not job and resolved_file(reader, REDHAT_RC):
        return f"{REDHAT_RC} is there, which Red Hat's Upstart runs for each runlevel"
    return None


def _is_redhat(reader: GuestReader) -> bool:
    status = status_of(reader, REDHAT_SCRIPTS)
    return status is not None and status.kind == "directory"


def _is_suse(reader: GuestReader) -> bool:
    status = status_of(reader, DEBIAN_SCRIPTS / "rc3.d")
    return status is not None and status.kind == "directory"


def _dialect(reader: GuestReader) -> str:
    if _is_suse(reader):  # asked first: SUSE's /etc/rc.d is a link to /etc/init.d
        return "suse-startpar" if _by_dependency(reader) else "suse"
    if _is_redhat(reader):
        return "redhat"
    return "debian-startpar" if _by_dependency(reader) else "debian"


def _by_dependency(reader: GuestReader) -> bool:
    """Whether boot goes by the makefiles of insserv."""
    # sysv-rc's own condition: three files that are not empty, and no word against it
    sizes = [status_of(reader, DEBIAN_SCRIPTS / name) for name in DEPENDENCIES]
    return (
        all(status is not None and status.size for status in sizes)
        and status_of(reader, LEGACY_ORDER) is None
        and any(resolved_file(reader, path) for path in STARTPAR)
    )


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that runlevels' scripts run the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named sysv", *pid1.evidence),
        dialect=_dialect(reader),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent having been started by the script; None: nothing does."""
    if running.get("pid1") == "systemd":
        return "process 1 is systemd"
    parent = running.get("parent")
    name = parent.get("comm") if isinstance(parent, dict) else None
    if name != "guest-agent":
        return f"its parent is not the script's loop but {parent!r:.120}"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The script and its links, those that start it last; then what startpar reads."""
    scripts = REDHAT_SCRIPTS if verdict.dialect == "redhat" else DEBIAN_SCRIPTS
    operations: list[Operation] = [
        WriteFile(
            path=scripts / service.name,
            content=render("sysv/guest-agent.j2", service=service),
            mode=0o755,
        ),
        *_links(service, verdict.dialect, scripts),
    ]
    if verdict.dialect.endswith("-startpar"):
        operations += [
            EditBlock(
                path=scripts / name,
                name=service.name,
                content=render("sysv/depend.j2", service=service),
            )
            for name in (".depend.stop", ".depend.start")
        ]
    return operations


def _links(service: Service, dialect: str, scripts: PurePosixPath) -> list[Operation]:
    suse = dialect.startswith("suse")
    levels = scripts if suse else scripts.parent
    target = f"../{service.name}" if suse else f"../init.d/{service.name}"
    orders = (
        ("K01", SUSE_LEVELS if suse else STOP_LEVELS),
        ("S99", SUSE_LEVELS if suse else START_LEVELS),
    )
    return [
        Symlink(path=levels / f"rc{number}.d" / f"{order}{service.name}", target=target)
        for order, numbers in orders
        for number in numbers
    ]
