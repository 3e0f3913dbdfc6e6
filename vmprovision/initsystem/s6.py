"""s6: lines in ``/etc/s6/rc.local``, else a service directory that s6-svscan watches.

s6-linux-init(8), s6-svscan(8), s6-supervise(8).  The database of s6-rc is compiled
by the guest's own tool, which cannot run offline, so it is left alone.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import EditBlock, Operation, WriteFile
from vmprovision.filesystem.protocol import follow, read_text, resolved_file
from vmprovision.guest.facts import InitSystem, InitVerdict
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.rendering import render
from vmprovision.initsystem.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.rendering import Service

NAME: InitSystem = "s6"
RC_LOCAL = PurePosixPath("/etc/s6/rc.local")
# s6-linux-init(8) copies its `run-image` to /run, where s6-svscan watches `service`.
BASE = PurePosixPath("/etc/s6-linux-init/current")
SCANDIR = BASE / "run-image/service"
VARIANTS: tuple[tuple[str, PurePosixPath | None], ...] = (
    ("rc.local", RC_LOCAL),
    ("scandir", SCANDIR),
)
EXECUTABLE = 0o755
TRACES = Traces(
    programs=("/usr/bin/s6-linux-init", "/bin/s6-linux-init"),
    files=(str(RC_LOCAL),),
    folders=(str(BASE),),
)


def detect(reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
    """s6-linux-init is PID 1, and there is a place that it reads without being compiled."""
    if pid1.program != "s6":
        return None
    if hook := resolved_file(reader, str(RC_LOCAL)):
        dialect, evidence = "rc.local", f"{hook} is there for commands to run at boot"
    elif found := _scandir(reader, pid1):
        dialect, hook = "scandir", found
        evidence = f"{hook} is what s6-svscan watches once it is copied to /run"
    else:
        return None
    return InitVerdict(
        system=NAME,
        pid1="s6",
        confidence="likely" if dialect == "rc.local" else "certain",
        evidence=(*pid1.evidence, f"{pid1.path} starts s6", evidence),
        hook=hook,
        dialect=dialect,
    )


def _scandir(reader: GuestReader, pid1: Pid1) -> PurePosixPath | None:
    """The image of s6-svscan's directory, where the init script or the default has it."""
    script = (read_text(reader, pid1.path) if pid1.path else None) or ""
    path = follow(reader, (_named_base(script) or BASE) / "run-image/service")
    status = reader.lstat(path) if path else None
    return path if status is not None and status.kind == "directory" else None


def _named_base(script: str) -> PurePosixPath | None:
    """Return the directory that an init script gives to s6-linux-init with ``-c``."""
    for line in without_comments(script):
        _, called, rest = line.partition("s6-linux-init ")
        words = [word.strip("\"'") for word in rest.split()] if called else []
        for word, following in pairwise([*words, ""]):
            value = following if word == "-c" else word.removeprefix("-c")
            if word.startswith("-c") and value.startswith("/"):
                return PurePosixPath(value)
    return None


def told(reader: GuestReader, pid1: Pid1) -> InitVerdict:
    """The caller says that s6 runs the services: rc.local, else its scan directory."""
    scandir = None if resolved_file(reader, str(RC_LOCAL)) else _scandir(reader, pid1)
    return InitVerdict(
        system=NAME,
        pid1=pid1.program,
        confidence="told",
        evidence=("the caller named s6", *pid1.evidence),
        hook=scandir or follow(reader, RC_LOCAL) or RC_LOCAL,
        dialect="scandir" if scandir else "rc.local",
    )


def running_fault(running: Mapping[str, Any], verdict: InitVerdict) -> str | None:
    """What speaks against the agent having been started by s6; None where nothing does."""
    if running.get("pid1") == "systemd":
        return "process 1 is 'systemd'"
    parent = running.get("parent") or {}
    if verdict.dialect == "scandir" and parent.get("comm") != "s6-supervise":
        return f"its parent is not s6-supervise but {parent.get('comm')!r:.80}"
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """The block in rc.local, or the one script of a service directory."""
    if verdict.dialect == "scandir":
        return [
            WriteFile(
                path=(verdict.hook or SCANDIR) / service.name / "run",
                content=render("s6/run.j2", service=service),
                mode=EXECUTABLE,
            )
        ]
    return [
        EditBlock(
            path=verdict.hook or RC_LOCAL,
            name=service.name,
            content=render("s6/rc.local.j2", service=service),
            before="exit",
            prologue=b"#!/bin/sh\n",
            mode=0o111,
        )
    ]
