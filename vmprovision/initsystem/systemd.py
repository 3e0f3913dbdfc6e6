"""systemd: a unit, its link in the target that boots, and a preset.

systemd.unit(5), systemd.preset(5).  The preset is needed beside the link: a
guest without a machine-id runs ``preset-all`` at its first boot, and on
distributions whose presets end in ``disable *`` that would take the link away.  Of
all presets' lines the first that matches counts, by file name, so ours sorts before
those of the guest.
Releases before 232 have no dynamic users, and would leave the agent root.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import resolved_file, status_of
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.targets import USUAL, find_boot_target
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "systemd"
# (dialect, hook) of every way in which it may be met
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", None), ("static-user", None))
UNITS = PurePosixPath("/etc/systemd/system")
LINKS = UNITS / f"{USUAL}.wants"
PRESETS = PurePosixPath("/etc/systemd/system-preset")
PRESET_FOLDERS = (
    str(PRESETS),
    "/usr/local/lib/systemd/system-preset",
    "/usr/lib/systemd/system-preset",
    "/lib/systemd/system-preset",
)
# by choice, each sorting before the one before it
PRESET_NAMES = tuple(f"{order}guest-agent.preset" for order in ("00-", "0-", "+", "!", "!!", "!!!"))
# a manager that holds its own code, as all did before 250, and what such a one contains
WHOLE_SIZE = 500_000
PROGRAM_LIMIT = 8 << 20
MANAGER = b"org.freedesktop.systemd1"
PROGRAMS = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
TRACES = Traces(
    programs=(*PROGRAMS, "/bin/systemd"),
    folders=("/etc/systemd/system/multi-user.target.wants",),
)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Systemd is PID 1; or there is no other init, and systemd itself is there.

    An initramfs made by dracut starts ``systemd`` without any ``/sbin/init``.
    """
    if pid1.program == "systemd":
        verdict = InitVerdict(
            system=NAME,
            pid1="systemd",
            confidence="certain",
            evidence=(*pid1.evidence, f"{pid1.path} is systemd"),
            dialect=_dialect(reader, pid1.path),
        )
        return _with_places(reader, pid1, verdict)
    nothing_else = pid1.program in ("none", "shell")
    for path in PROGRAMS:
        if nothing_else and status_of(reader, PurePosixPath(path)) is not None:
            verdict = InitVerdict(
                system=NAME,
                pid1="systemd",
                confidence="likely",
                evidence=(*pid1.evidence, f"{path} is there, and no other init is"),
                dialect=_dialect(reader, PurePosixPath(path)),
            )
            return _with_places(reader, pid1, verdict)
    return None


def _with_places(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with where this guest's systemd takes links and presets from."""
    target = find_boot_target(reader, pid1.units)
    preset = _first_preset(reader)
    hook = None if target.name == USUAL else UNITS / f"{target.name}.wants"
    evidence = (f"it boots into {target.name}, and never into {USUAL}",) if hook else ()
    return replace(
        verdict,
        evidence=(*verdict.evidence, *evidence),
        hook=hook,
        preset=preset or "",
        obstacle=target.obstacle
        or ("" if preset else "its presets have names that sort before any that ours can have"),
    )


def _first_preset(reader: GuestReader) -> str | None:
    """Return a name for our preset that sorts before the guest's own; None where none does."""
    folders = map(PurePosixPath, PRESET_FOLDERS)
    names = {name for folder in folders for name in reader.list_directory(folder)}
    others = {name for name in names if name.endswith(".preset") and name not in PRESET_NAMES}
    first = min((name.encode() for name in others), default=None)
    return next(
        (name for name in PRESET_NAMES if first is None or name.encode() < first),
        None,
    )


def _dialect(reader: GuestReader, path: PurePosixPath | None) -> str:
    """Whether it knows dynamic users, by its words; since 250 they are in a library beside it."""
    real = resolved_file(reader, str(path)) if path else None
    status = reader.lstat(real) if real else None
    if real is None or status is None or status.size < WHOLE_SIZE:
        return ""
    content = reader.read(real, limit=PROGRAM_LIMIT)
    return "static-user" if MANAGER in content and b"DynamicUser" not in content else ""


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that systemd runs the services."""
    verdict = InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named systemd", *pid1.evidence),
        dialect=_dialect(reader, _program(reader, pid1)),
    )
    return replace(_with_places(reader, pid1, verdict), obstacle="")


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


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as systemd's service; None where nothing does."""
    if running.get("pid1") != "systemd":
        return f"process 1 is {running.get('pid1')!r:.80}"
    if not str(running.get("cgroup")).endswith("/guest-agent.service"):
        return f"it is not in its service's control group but in {running.get('cgroup')!r:.200}"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Unit, preset, and last the link that starts the unit at boot."""
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
