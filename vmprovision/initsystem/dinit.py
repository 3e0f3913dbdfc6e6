"""dinit: a service description, and its link in the directory that ``boot`` waits for.

dinit-service(5): ``waits-for.d``.  ``dinitctl enable`` makes the same link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import read_text
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "dinit"
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", None),)
SERVICES = PurePosixPath("/etc/dinit.d")
BOOT_LINKS = SERVICES / "boot.d"
# Where dinit(8) looks for the description of `boot`, in this order.
BOOT_FILES = tuple(
    PurePosixPath(folder) / "boot"
    for folder in ("/etc/dinit.d", "/usr/local/lib/dinit.d", "/usr/lib/dinit.d", "/lib/dinit.d")
)
_LINKS = re.compile(r"(?:waits-for|depends-ms|depends-on)\.d\s*[=:]\s*(\S+)")
TRACES = Traces(programs=("/sbin/dinit", "/usr/bin/dinit"), folders=(str(SERVICES),))


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Dinit is PID 1, and its ``boot`` service waits for what is linked in ``boot.d``."""
    if pid1.program != "dinit":
        return None
    waiting = _waiting(reader)
    if waiting is None:
        return None
    return InitVerdict(
        system=NAME,
        pid1="dinit",
        confidence="certain",
        evidence=(
            *pid1.evidence,
            f"{pid1.path} is dinit",
            f"{waiting} waits for the services in {BOOT_LINKS}",
        ),
    )


def _waiting(reader: GuestReader) -> PurePosixPath | None:
    """The description of ``boot`` that dinit loads, where it names our directory of links."""
    for path in BOOT_FILES:
        text = read_text(reader, path)
        if text is None:
            continue
        named = (_LINKS.match(line) for line in without_comments(text))
        # a relative name is relative to the directory of the description
        places = {posixpath.normpath(path.parent / match[1]) for match in named if match}
        return path if str(BOOT_LINKS) in places else None
    return None


def told(_reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that dinit runs the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named dinit", *pid1.evidence),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as dinit's service; None where nothing does."""
    if running.get("pid1") == "systemd":
        return "process 1 is 'systemd'"
    parent = running.get("parent") or {}
    if parent.get("pid") != 1 and parent.get("comm") != "dinit":
        return f"its parent is not dinit but {parent.get('comm')!r:.80}"
    return None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """The description, and last the link that ``boot`` waits for."""
    return [
        WriteFile(
            path=SERVICES / service.name,
            content=render("dinit/guest-agent.j2", service=service),
        ),
        Symlink(path=BOOT_LINKS / service.name, target=f"../{service.name}"),
    ]
