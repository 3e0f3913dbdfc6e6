"""The fallback for an unknown init: a block of lines in ``rc.local``.

An old file may be without effect.  So it counts only if something that runs at boot
names it, or if the guest has no marker of another init system.  An unknown init cannot
supervise the agent, so a loop in the script restarts it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import follow, read_text, resolved_file
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.bootscript import loop_in_script
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers

if TYPE_CHECKING:
    from vmprovision.changes.operations import Operation
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

PLACES = ("/etc/rc.d/rc.local", "/etc/rc.local")
NEW = PurePosixPath(PLACES[-1])  # the path to use if none exists
# Programs of process 1 that no other module supports, and sysvinit for its inittab. A bare
# shell is missing here, because it runs nothing at boot.
UNCLAIMED = ("unknown", "script", "toybox", "minit", "sysvinit")
# Other files that may run at boot, and may then run rc.local.
CALLERS = ("/etc/inittab", "/etc/init.d/rcS", "/etc/rc", "/etc/rc.d/rc", "/etc/rc.multi")
PROGRAM_LIMIT = 8 << 20
_NAMES_IT = re.compile(r"/rc\.local\b")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if the init is unknown and rc.local exists; sysvinit must name it."""
    hook = _find_hook(reader) if pid1.program in UNCLAIMED else None
    if hook is None:
        return None
    caller = find_caller(reader, pid1)
    if caller is None and pid1.program == "sysvinit":
        return None
    called = f", and {caller} names it" if caller else " for commands to run at boot"
    return Evidence((f"{hook} is there{called}",), "likely")


def complete(reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the rc.local that exists, or the one to create."""
    return replace(verdict, hook=_find_hook(reader) or follow(reader, NEW) or NEW)


def find_caller(reader: GuestReader, pid1: Pid1) -> PurePosixPath | None:
    """Return the file that names rc.local outside its comments, or None."""
    if pid1.path:
        program = reader.read(pid1.path, limit=PROGRAM_LIMIT)
        script = program.startswith(b"#!")
        if _names_hook(program.decode("latin-1")) if script else b"/rc.local" in program:
            return pid1.path
    for path in (PurePosixPath(name) for name in CALLERS):
        if _names_hook(read_text(reader, path) or ""):
            return path
    return None


def _names_hook(text: str) -> bool:
    return any(_NAMES_IT.search(line) for line in without_comments(text))


def _find_hook(reader: GuestReader) -> PurePosixPath | None:
    """Return the rc.local that exists, or None."""
    found = (resolved_file(reader, path) for path in PLACES)
    return next((path for path in found if path), None)


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the single block, for the file that the verdict names."""
    return [loop_in_script(verdict.hook or NEW, service)]


DEFINITION = Definition(
    name="standalone",
    variants=(
        Variant(
            hook=NEW,
            # systemd runs rc.local too, in a service
            supervisor=Supervisor(allows_systemd=True),
            live=Live(files=(PLACES,)),
        ),
    ),
    markers=Markers(files=PLACES),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
