"""dinit: a service description, and its link in the directory that ``boot`` waits for.

dinit-service(5): ``waits-for.d``.  ``dinitctl enable`` makes the same link.  A ``boot`` without
such a directory gets a line of its own.

dinit starts everything at once, and a description without dependencies starts before the
guest's file systems are mounted and writable.  So the agent waits for a service that the
guest's own daemons wait for, else for all that ``boot`` names itself.  It never names a service
that is not there: dinit would then load neither the agent nor ``boot``.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import EditBlock, Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.definition import Definition, Evidence, Live, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import NAME, render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

SERVICES = PurePosixPath("/etc/dinit.d")
BOOT_LINKS = SERVICES / "boot.d"
# dinit(8)'s search path for descriptions; /run/dinit.d is made anew at each boot.
FOLDERS = tuple(
    PurePosixPath(folder)
    for folder in ("/etc/dinit.d", "/usr/local/lib/dinit.d", "/usr/lib/dinit.d", "/lib/dinit.d")
)
# What daemons wait for: in Chimera; in dinit's own example services and in Artix.
READY = ("local.target", "loginready", "rcboot")
NAMED_LIMIT = 32

_SETTING = re.compile(r"([a-z-]+(?:\.d)?)\s*(?:\+=|[=:])\s*(\S+)")
# without "@" and "$": an argument or a variable of a description
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_HARD = ("depends-on", "depends-ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Boot:
    """What the description of ``boot`` says.

    Attributes:
        path: the description that dinit loads.
        links: the directory with links to the services that it waits for, if it has one.
        waits_for: the services that the agent waits for.
    """

    path: PurePosixPath
    links: PurePosixPath | None
    waits_for: tuple[str, ...]


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if dinit is process 1 and has a description of ``boot``."""
    boot = _read_boot(reader) if pid1.program == "dinit" else None
    if boot is None:
        return None
    how = f"waits for the services in {boot.links}" if boot.links else "names its services"
    return Evidence((f"{pid1.path} is dinit", f"{boot.path} {how}"))


def complete(reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the directory of links, or with the description of ``boot``."""
    boot = _read_boot(reader)
    if boot is None:
        return replace(verdict, hook=BOOT_LINKS)
    return replace(
        verdict,
        hook=boot.links or boot.path,
        dialect="" if boot.links else "boot",
        waits_for=boot.waits_for,
    )


def _read_boot(reader: GuestReader) -> _Boot | None:
    """Return what the description of ``boot`` that dinit loads says."""
    for folder in FOLDERS:
        path = folder / "boot"
        text = read_text(reader, path)
        if text is not None:
            found = map(_SETTING.match, without_comments(text))
            settings = [(match[1], match[2]) for match in found if match]
            return _Boot(
                path=path,
                links=_links(path, settings),
                waits_for=_waits_for(reader, settings),
            )
    return None


def _links(boot: PurePosixPath, settings: Sequence[tuple[str, str]]) -> PurePosixPath | None:
    """Return the directory of links that ``dinitctl enable`` uses, else another one."""
    found: dict[str, list[PurePosixPath]] = {}
    for setting, value in settings:
        # a relative path starts at the description's directory
        place = PurePosixPath(posixpath.normpath(boot.parent / value))
        if "$" not in value and place.parts[1:2] != ("run",):
            found.setdefault(setting, []).append(place)
    soft = found.get("waits-for.d", [])
    if BOOT_LINKS in soft:
        return BOOT_LINKS
    # without the agent, a boot that depends on it fails
    hard = [place for setting in _HARD for place in found.get(f"{setting}.d", [])]
    return next(iter([*soft, *hard]), None)


def _waits_for(reader: GuestReader, settings: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the services that the agent waits for; each has a description."""
    ready = next((name for name in READY if _is_described(reader, name)), None)
    if ready:
        return (ready,)
    named = (value for setting, value in settings if setting in (*_HARD, "waits-for"))
    names = [name for name in dict.fromkeys(named) if _NAME.fullmatch(name) and name != NAME]
    return tuple(name for name in names[:NAMED_LIMIT] if _is_described(reader, name))


def _is_described(reader: GuestReader, name: str) -> bool:
    return any(resolved_file(reader, folder / name) for folder in FOLDERS)


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the description, and last what makes ``boot`` wait for it."""
    description = WriteFile(
        path=SERVICES / service.name,
        content=render("dinit/guest-agent.j2", service=service, waits_for=verdict.waits_for),
    )
    if verdict.dialect == "boot":
        content = f"waits-for: {service.name}\n".encode()
        path = verdict.hook or SERVICES / "boot"
        return [description, EditBlock(path=path, name=service.name, content=content)]
    links = verdict.hook or BOOT_LINKS
    target = f"../{service.name}" if links.parent == SERVICES else str(description.path)
    return [description, Symlink(path=links / service.name, target=target)]


def _variant(dialect: str, hook: PurePosixPath, *, live: Live | None = None) -> Variant:
    return Variant(
        dialect=dialect, hook=hook, supervisor=Supervisor(parents=(1, "dinit")), live=live
    )


DEFINITION = Definition(
    name="dinit",
    variants=(
        _variant(
            "",
            BOOT_LINKS,
            live=Live(
                processes=("dinit",),
                start=(f"dinitctl restart {NAME}", f"dinitctl start {NAME}"),
                stop=(f"dinitctl stop {NAME}",),
            ),
        ),
        _variant("boot", SERVICES / "boot"),
    ),
    markers=Markers(programs=("/sbin/dinit", "/usr/bin/dinit"), folders=(str(SERVICES),)),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
