"""systemd: a unit, its link in the target that boots, and a preset.

systemd.unit(5), systemd.preset(5).  The link alone is not enough: a guest without a
machine-id runs ``preset-all`` at its first boot, and on distributions whose presets end
in ``disable *`` that removes the link.  The first matching line of all presets counts,
in the order of their file names, so the agent's preset sorts before the guest's own.
Releases before 232 have no dynamic users and would leave the agent root.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import resolved_file, status_of
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render
from vmprovision.initsystem.targets import USUAL, find_boot_target

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

UNITS = PurePosixPath("/etc/systemd/system")
LINKS = UNITS / f"{USUAL}.wants"
PRESETS = PurePosixPath("/etc/systemd/system-preset")
PRESET_FOLDERS = (
    str(PRESETS),
    "/usr/local/lib/systemd/system-preset",
    "/usr/lib/systemd/system-preset",
    "/lib/systemd/system-preset",
)
# The first is preferred; each sorts before its predecessor.
PRESET_NAMES = tuple(f"{order}guest-agent.preset" for order in ("00-", "0-", "+", "!", "!!", "!!!"))
# Before version 250 the manager has all its code in one file, which is at least so large.
WHOLE_SIZE = 500_000
PROGRAM_LIMIT = 8 << 20
MANAGER = b"org.freedesktop.systemd1"
PROGRAMS = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if systemd is process 1, or exists without any other init.

    An initramfs made by dracut starts ``systemd`` without any ``/sbin/init``.
    """
    if pid1.program == "systemd":
        return Evidence((f"{pid1.path} is systemd",))
    if pid1.program in ("none", "shell"):
        for path in PROGRAMS:
            if status_of(reader, PurePosixPath(path)) is not None:
                sentence = f"{path} is there, and no other init is"
                return Evidence((sentence,), "likely", pid1="systemd")
    return None


def complete(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the target, the preset's name and the dialect for this guest."""
    target = find_boot_target(reader, pid1.units)
    preset = _first_preset(reader)
    hook = None if target.name == USUAL else UNITS / f"{target.name}.wants"
    evidence = (f"it boots into {target.name}, and never into {USUAL}",) if hook else ()
    return replace(
        verdict,
        dialect=_dialect(reader, _program(reader, pid1)),
        evidence=(*verdict.evidence, *evidence),
        hook=hook,
        preset=preset or "",
        obstacle=target.obstacle
        or ("" if preset else "its presets sort before every name for the agent's preset"),
    )


def _first_preset(reader: GuestReader) -> str | None:
    """Return a name for the agent's preset that sorts before the guest's own, or None."""
    folders = map(PurePosixPath, PRESET_FOLDERS)
    names = {name for folder in folders for name in reader.list_directory(folder)}
    others = {name for name in names if name.endswith(".preset") and name not in PRESET_NAMES}
    first = min((name.encode() for name in others), default=None)
    return next(
        (name for name in PRESET_NAMES if first is None or name.encode() < first),
        None,
    )


def _dialect(reader: GuestReader, path: PurePosixPath | None) -> str:
    """Return ``static-user`` if the manager is too old for dynamic users.

    Since version 250 the text that shows it is in a separate library.
    """
    real = resolved_file(reader, str(path)) if path else None
    status = reader.lstat(real) if real else None
    if real is None or status is None or status.size < WHOLE_SIZE:
        return ""
    content = reader.read(real, limit=PROGRAM_LIMIT)
    return "static-user" if MANAGER in content and b"DynamicUser" not in content else ""


def _program(reader: GuestReader, pid1: Pid1) -> PurePosixPath | None:
    if pid1.program == "systemd":
        return pid1.path
    found = (resolved_file(reader, path) for path in PROGRAMS)
    return next((path for path in found if path), None)


def is_enabling_link(path: PurePosixPath, name: str) -> bool:
    """Return whether a link at this path enables the service of that name in some target."""
    folder = path.parent
    return (
        folder.parent == UNITS
        and folder.name.endswith(".target.wants")
        and path.name == f"{name}.service"
    )


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the unit, the preset, and last the link that starts the unit at boot."""
    unit = f"{service.name}.service"
    links = verdict.hook or LINKS
    return [
        WriteFile(
            path=UNITS / unit,
            content=render(
                "systemd/guest-agent.service.j2",
                service=service,
                dynamic=verdict.dialect != "static-user",
                target=links.name.removesuffix(".wants"),
            ),
        ),
        WriteFile(
            path=PRESETS / (verdict.preset or PRESET_NAMES[0]),
            content=render("systemd/guest-agent.preset.j2", service=service),
        ),
        Symlink(path=links / unit, target=str(UNITS / unit)),
    ]


SUPERVISOR = Supervisor(pid1="systemd", in_unit=True)
RELOAD = "systemctl daemon-reload"
DEFINITION = Definition(
    name="systemd",
    variants=(
        Variant(
            supervisor=SUPERVISOR,
            live=Live(
                files=(("/run/systemd/system",),),  # sd_booted(3)
                start=(RELOAD, f"systemctl restart {NAME}"),
                stop=(f"systemctl stop {NAME}",),
                afterwards=(RELOAD,),
            ),
        ),
        Variant(dialect="static-user", supervisor=SUPERVISOR),
    ),
    markers=Markers(programs=(*PROGRAMS, "/bin/systemd"), folders=(str(LINKS),)),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
