"""One module for each init system that the agent can run under.

Each module states what is peculiar to its init system in a ``DEFINITION``; what they
have in common is in ``definition.py``.  ``docs/adding-an-init-system.md`` shows how to add one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmprovision.errors import PlanError
from vmprovision.guest.facts import INIT_SYSTEMS, Hint, InitVerdict
from vmprovision.initsystem import (
    busybox,
    dinit,
    finit,
    openrc,
    procd,
    runit,
    s6,
    slackware,
    standalone,
    systemd,
    sysv,
    upstart,
)
from vmprovision.initsystem.markers import find_markers, find_programs

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitSystem, Pid1
    from vmprovision.initsystem.definition import Definition

# The order in which definitions are tried, in guests and by `guest-agent install`. First
# those that process 1 identifies. Then OpenRC, which another init starts. sysv is before
# upstart, because Red Hat's Upstart runs SysV scripts. The fallback is last.
DEFINITIONS: tuple[Definition, ...] = (
    systemd.DEFINITION,
    runit.DEFINITION,
    dinit.DEFINITION,
    s6.DEFINITION,
    finit.DEFINITION,
    procd.DEFINITION,
    openrc.DEFINITION,
    sysv.DEFINITION,
    slackware.DEFINITION,
    upstart.DEFINITION,
    busybox.DEFINITION,
    standalone.DEFINITION,
)


# find_pid1()'s answers for a guest without an identified process 1
NO_INIT = ("none", "shell")


def judge_init(reader: GuestReader, pid1: Pid1, *, override: InitSystem | None) -> InitVerdict:
    """Return which init system runs the guest's services.

    ``system`` is None if no definition matches, or if the evidence is contradictory.

    Args:
        reader: the guest's files.
        pid1: the result of ``find_pid1``.
        override: the init system that the caller states; it overrides the evidence.
    """
    if override is not None:
        return definition_of(override).override(reader, pid1)
    verdict = None
    if not pid1.doubt:
        asked = (definition.judge(reader, pid1) for definition in DEFINITIONS)
        verdict = next((found for found in asked if found), None)
    doubt = pid1.doubt or (_find_rivals(reader, pid1, verdict) if verdict else "")
    if verdict is None or doubt:
        return InitVerdict(
            system=None,
            pid1=pid1.program,
            confidence="unknown",
            evidence=pid1.evidence,
            doubt=doubt,
        )
    return verdict if pid1.is_seen else replace(verdict, confidence="likely")


def _find_rivals(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> str:
    """Return what contradicts a verdict that rests on the absence of others; empty if nothing."""
    if verdict.system == "standalone" and standalone.find_caller(reader, pid1) is None:
        left = [
            hint.seen
            for definition in DEFINITIONS
            if definition.name not in ("standalone", "busybox")
            for hint in find_markers(reader, definition.name, definition.markers)
        ]
        return f"nothing names {verdict.hook}, and {', '.join(left)}" if left else ""
    if pid1.program not in NO_INIT:
        return ""
    others = [
        f"{path} ({definition.name})"
        for definition in DEFINITIONS
        if definition.name not in (verdict.system, "busybox")
        for path in find_programs(reader, definition.markers)
    ]
    if not others:
        return ""
    return f"nothing starts {verdict.system}, and {', '.join(others)} could be started as well"


def find_hints(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> tuple[Hint, ...]:
    """Return all evidence in the guest for an init system, each with its outcome."""
    markers = [
        hint
        for definition in DEFINITIONS
        for hint in find_markers(reader, definition.name, definition.markers)
    ]
    offered = [Hint(speaks_for=what, kind="boot", seen=seen) for what, seen in pid1.offered]
    return tuple(replace(hint, outcome=_outcome(hint, verdict)) for hint in (*markers, *offered))


def _outcome(hint: Hint, verdict: InitVerdict) -> str:
    """Return why a hint decides nothing, or that it agrees with the verdict."""
    if hint.kind == "boot":
        return "boots only if a person chooses it"
    if hint.speaks_for == verdict.system:
        return "agrees"
    if verdict.system is None:
        return "shows what could run services, not what does"
    if hint.kind == "program":
        return f"nothing starts it as process 1, which is {verdict.pid1}"
    return f"{hint.speaks_for} would read it, but {verdict.system} runs the services"


def definition_of(name: str) -> Definition:
    """Return the definition of an init system.

    Raises:
        PlanError: no init system has this name.
    """
    found = next((each for each in DEFINITIONS if each.name == name), None)
    if found is None:
        raise PlanError(
            f"unknown init system: {name}", hint=f"choose one of {', '.join(INIT_SYSTEMS)}"
        )
    return found
