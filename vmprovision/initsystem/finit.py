"""Finit: a service line in a file of its own, and the link that enables it.

finit.conf(5); ``initctl enable`` makes the same link.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import Operation, Symlink, WriteFile
from vmprovision.filesystem.protocol import status_of
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "finit"
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (("", None),)
SNIPPETS = PurePosixPath("/etc/finit.d")
TRACES = Traces(
    programs=("/sbin/finit", "/usr/sbin/finit"),
    files=("/etc/finit.conf",),
    folders=(str(SNIPPETS / "enabled"),),
)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """Finit is PID 1; it reads ``/etc/finit.d`` whatever ``/etc/finit.conf`` says."""
    if pid1.program != "finit":
        return None
    there = status_of(reader, SNIPPETS) is not None
    return InitVerdict(
        system=NAME,
        pid1="finit",
        confidence="certain",
        evidence=(
            *pid1.evidence,
            f"{pid1.path} is finit",
            *((f"{SNIPPETS} is there for services",) if there else ()),
        ),
    )


def told(_reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that finit runs the services."""
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named finit", *pid1.evidence),
    )


def running_fault(running: Mapping[str, Any], _verdict: InitVerdict) -> str | None:
    """What speaks against the agent running as finit's service; None where nothing does."""
    if running.get("pid1") == "systemd":
        return "process 1 is 'systemd'"
    parent = running.get("parent") or {}
    if parent.get("pid") != 1:
        return f"its parent is not process 1 but {parent.get('comm')!r:.80}"
    return None


def service_operations(service: Service, _verdict: InitVerdict) -> list[Operation]:
    """The service's file, and last the link that enables it."""
    name = f"{service.name}.conf"
    return [
        WriteFile(
            path=SNIPPETS / "available" / name,
            content=render("finit/guest-agent.conf.j2", service=service),
        ),
        Symlink(path=SNIPPETS / "enabled" / name, target=f"../available/{name}"),
    ]
