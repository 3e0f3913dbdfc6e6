"""procd, OpenWrt's init: a script for ``/etc/rc.common``, and its links in ``/etc/rc.d``.

OpenWrt's "procd init scripts" guide and the comments of ``procd.sh``.  ``enable`` in
``rc.common`` makes the same links.  Where the root filesystem is squashfs under an
overlay, nothing can be written offline, and mounting the image for writing fails.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import resolved_file
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "procd"
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", None),)
SCRIPTS = PurePosixPath("/etc/init.d")
LINKS = PurePosixPath("/etc/rc.d")
FRAMEWORK = "/etc/rc.common"
TRACES = Traces(programs=("/sbin/procd",), files=(FRAMEWORK,))


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """OpenWrt's init is PID 1, and what its scripts are run by is there."""
    if pid1.program != "procd" or resolved_file(reader, FRAMEWORK) is None:
        return None
    return InitVerdict(
        system=NAME,
        pid1="procd",
        confidence="certain",
        evidence=(*pid1.evidence, f"{pid1.path} is procd's, and {FRAMEWORK} is there"),
    )


def told(_reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that procd runs the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named procd", *pid1.evidence),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as procd's instance; None where nothing does."""
    if running.get("pid1") != "procd":
        return f"process 1 is {running.get('pid1')!r:.80}"
    parent = running.get("parent")
    if not isinstance(parent, dict) or parent.get("pid") != 1:
        return f"its parent is not process 1 but {parent!r:.120}"
    return None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """The script, the link that stops it, and last the one that starts it."""
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
