"""dinit: a service description, and its link in the directory that ``boot`` waits for.

dinit-service(5): ``waits-for.d``.  ``dinitctl enable`` makes the same link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import read_text
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

SERVICES = PurePosixPath("/etc/dinit.d")
BOOT_LINKS = SERVICES / "boot.d"
# dinit(8)'s search path for the description of `boot`.
BOOT_FILES = tuple(
    PurePosixPath(folder) / "boot"
    for folder in ("/etc/dinit.d", "/usr/local/lib/dinit.d", "/usr/lib/dinit.d", "/lib/dinit.d")
)
_LINKS = re.compile(r"(?:waits-for|depends-ms|depends-on)\.d\s*[=:]\s*(\S+)")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if dinit is process 1 and ``boot`` waits for the links in ``boot.d``."""
    waiting = _find_boot(reader) if pid1.program == "dinit" else None
    if waiting is None:
        return None
    return Evidence(
        (
            f"{pid1.path} is dinit",
            f"{waiting} waits for the services in {BOOT_LINKS}",
        )
    )


def _find_boot(reader: GuestReader) -> PurePosixPath | None:
    """Return the description of ``boot`` that dinit loads, if it names ``boot.d``."""
    for path in BOOT_FILES:
        text = read_text(reader, path)
        if text is None:
            continue
        named = (_LINKS.match(line) for line in without_comments(text))
        # a relative path starts at the description's directory
        places = {posixpath.normpath(path.parent / match[1]) for match in named if match}
        return path if str(BOOT_LINKS) in places else None
    return None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """Return the description, and last the link that ``boot`` waits for."""
    return [
        WriteFile(
            path=SERVICES / service.name,
            content=render("dinit/guest-agent.j2", service=service),
        ),
        Symlink(path=BOOT_LINKS / service.name, target=f"../{service.name}"),
    ]


DEFINITION = Definition(
    name="dinit",
    variants=(
        Variant(
            supervisor=Supervisor(parents=(1, "dinit")),
            live=Live(
                processes=("dinit",),
                start=(f"dinitctl restart {NAME}", f"dinitctl start {NAME}"),
                stop=(f"dinitctl stop {NAME}",),
            ),
        ),
    ),
    markers=Markers(programs=("/sbin/dinit", "/usr/bin/dinit"), folders=(str(SERVICES),)),
    detect=detect,
    service_operations=service_operations,
)
