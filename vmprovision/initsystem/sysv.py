"""SysV runlevels: a script in ``init.d`` and its links, for Red Hat, Debian and SUSE.

LSB init scripts, chkconfig(8), insserv(8). The script is the same, but the folders
differ. If insserv has made makefiles (``.depend.*``), Debian's ``rc`` follows them and
ignores links that they do not name. startpar accepts further ``TARGETS`` lines, so a
block with one is added. SUSE (init.d(7)) keeps the runlevels below ``/etc/init.d`` and
uses only 3 and 5. Its links that stop a service are in the runlevel that ends. Its
``rc`` reads the same makefiles.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import (
    EditBlock,
    Operation,
    Symlink,
    WriteFile,
)
from vmprovision.filesystem.protocol import read_text, resolved_file, status_of
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.inittab import read_inittab
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

START_LEVELS, STOP_LEVELS = (2, 3, 4, 5), (0, 1, 6)
SUSE_LEVELS = (3, 5)
REDHAT_SCRIPTS = PurePosixPath("/etc/rc.d/init.d")
REDHAT_RC = "/etc/rc.d/rc"
REDHAT_JOB = "/etc/init/rc.conf"  # RHEL 6's Upstart runs the scripts of a runlevel with it
DEBIAN_SCRIPTS = PurePosixPath("/etc/init.d")
DEPENDENCIES = (".depend.boot", ".depend.start", ".depend.stop")
LEGACY_ORDER = DEBIAN_SCRIPTS / ".legacy-bootordering"
STARTPAR = ("/bin/startpar", "/sbin/startpar", "/usr/bin/startpar", "/lib/startpar/startpar")
# Linux From Scratch has it in /etc/rc.d/init.d
_RUNS_RC = re.compile(r"(/etc/(?:rc\.d|init\.d|rc\.d/init\.d)/rc)\s+\d")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if sysvinit's inittab or Red Hat's Upstart runs the runlevels' scripts."""
    sentence = _reason(reader, pid1)
    return Evidence((sentence,)) if sentence else None


def complete(reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the layout of this guest's runlevels."""
    return replace(verdict, dialect=_dialect(reader))


def _reason(reader: GuestReader, pid1: Pid1) -> str | None:
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
    return _is_directory(reader, REDHAT_SCRIPTS)


def _is_directory(reader: GuestReader, path: PurePosixPath) -> bool:
    status = status_of(reader, path)
    return status is not None and status.kind == "directory"


def _dialect(reader: GuestReader) -> str:
    if _is_directory(
        reader, DEBIAN_SCRIPTS / "rc3.d"
    ):  # asked first: SUSE's /etc/rc.d is a link to /etc/init.d
        return "suse-startpar" if _by_dependency(reader) else "suse"
    if _is_redhat(reader):
        return "redhat"
    return "debian-startpar" if _by_dependency(reader) else "debian"


def _by_dependency(reader: GuestReader) -> bool:
    """Return whether boot follows insserv's makefiles."""
    # sysv-rc's own condition: three non-empty files, and no file that disables it
    sizes = [status_of(reader, DEBIAN_SCRIPTS / name) for name in DEPENDENCIES]
    return (
        all(status is not None and status.size for status in sizes)
        and status_of(reader, LEGACY_ORDER) is None
        and any(resolved_file(reader, path) for path in STARTPAR)
    )


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the script and its links, the links that start it last, then startpar's block."""
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


# the script's loop, named as the script was started: directly, or by its link in a runlevel
SUPERVISOR = Supervisor(parents=(NAME, f"S99{NAME}"))
SCRIPT = str(DEBIAN_SCRIPTS / NAME)  # Red Hat has a link to its own there


def _live(processes: tuple[str, ...], *folders: str) -> Live:
    return Live(
        processes=processes,
        files=tuple((folder,) for folder in folders),
        start=(
            f"update-rc.d {NAME} defaults",
            f"chkconfig --add {NAME}",
            f"{SCRIPT} restart",
        ),
        stop=(f"{SCRIPT} stop", f"chkconfig --del {NAME}"),
        afterwards=(f"update-rc.d {NAME} remove",),
    )


DEFINITION = Definition(
    name="sysv",
    variants=(
        Variant(
            dialect="redhat",
            supervisor=SUPERVISOR,
            live=_live(("init", "upstart"), str(REDHAT_SCRIPTS)),
        ),
        # in a running system update-rc.d makes the makefiles that startpar reads
        Variant(
            dialect="debian",
            supervisor=SUPERVISOR,
            live=_live(("init",), str(DEBIAN_SCRIPTS), "/etc/rc2.d"),
        ),
        *(
            Variant(dialect=dialect, supervisor=SUPERVISOR)
            for dialect in ("debian-startpar", "suse", "suse-startpar")
        ),
    ),
    markers=Markers(
        programs=("/lib/sysvinit/init",),
        files=("/etc/inittab",),
        folders=("/etc/rc.d/rc3.d", "/etc/init.d/rc3.d", "/etc/rc2.d"),
    ),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
