"""One module for each init system that we have a service for.

A module offers ``NAME``; ``detect(reader, pid1)``, which gives the
verdict where this init system runs the guest's services; and
``service_operations(service, verdict)``, pure, which gives what it needs, the
enabling operation last; ``told``, ``running_fault`` and ``TRACES`` beside them.
``docs/adding-an-init-system.md`` shows how to add one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vmprovision.errors import PlanError
from vmprovision.guest.facts import Hint, InitVerdict
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
from vmprovision.initsystem.traces import find_traces, present_programs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import PurePosixPath

    from vmprovision.changes.operations import Operation
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitSystem, Pid1
    from vmprovision.initsystem.rendering import Service
    from vmprovision.initsystem.traces import Traces


class InitSystemModule(Protocol):
    """What each module of this package offers."""

    NAME: InitSystem
    VARIANTS: tuple[tuple[str, PurePosixPath | None], ...]
    TRACES: Traces

    def detect(self, reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
        """The verdict, where this init system runs the guest's services."""

    def told(self, reader: GuestReader, pid1: Pid1) -> InitVerdict:
        """The verdict where the caller names this init system."""

    def running_fault(self, running: Mapping[str, Any], verdict: InitVerdict) -> str | None:
        """What the running agent's ``/info`` says against being run by this init system."""

    def service_operations(self, service: Service, verdict: InitVerdict) -> list[Operation]:
        """What makes the service start at every boot, the enabling operation last."""


# Asked in this order; the fallback is last, since it takes what nobody else knows.
# sysv before upstart: Red Hat's Upstart runs SysV scripts.
INIT_SYSTEMS: tuple[InitSystemModule, ...] = (
    systemd,
    openrc,
    sysv,
    slackware,
    upstart,
    runit,
    dinit,
    s6,
    finit,
    procd,
    busybox,
    standalone,
)


# what find_pid1() says where the guest has no program of its own for process 1
NO_INIT = ("none", "shell")


def judge_init(reader: GuestReader, pid1: Pid1, *, told: InitSystem | None) -> InitVerdict:
    """Which init system runs the guest's services.

    ``system`` is None for those not known here, and where the evidence contradicts itself.
    """
    if told is not None:
        return module_for(told).told(reader, pid1)
    verdict = None
    if not pid1.doubt:
        asked = (module.detect(reader, pid1) for module in INIT_SYSTEMS)
        verdict = next((found for found in asked if found), None)
    doubt = pid1.doubt or (_rivals(reader, pid1, verdict) if verdict else "")
    if verdict is None or doubt:
        return InitVerdict(
            system=None,
            pid1=pid1.program,
            confidence="unknown",
            evidence=pid1.evidence,
            doubt=doubt,
        )
    return verdict if pid1.is_seen else replace(verdict, confidence="likely")


def _rivals(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> str:
    """What speaks against a verdict that rests on nothing else being there; empty: nothing does."""
    if verdict.system == standalone.NAME and standalone.find_caller(reader, pid1) is None:
        left = [
            hint.seen
            for module in INIT_SYSTEMS
            if module.NAME not in (standalone.NAME, busybox.NAME)
            for hint in find_traces(reader, module.NAME, module.TRACES)
        ]
        return f"nothing names {verdict.hook}, and {', '.join(left)}" if left else ""
    if pid1.program not in NO_INIT:
        return ""
    others = [
        f"{path} ({module.NAME})"
        for module in INIT_SYSTEMS
        if module.NAME not in (verdict.system, busybox.NAME)
        for path in present_programs(reader, module.TRACES)
    ]
    if not others:
        return ""
    return f"nothing starts {verdict.system}, and {', '.join(others)} could be started as well"


def ways_of(module: InitSystemModule) -> list[InitVerdict]:
    """A verdict for every way in which an init system may be met, without any guest."""
    return [
        InitVerdict(
            system=module.NAME,
            pid1=module.NAME,
            confidence="told",
            evidence=(),
            hook=hook,
            dialect=dialect,
        )
        for dialect, hook in module.VARIANTS
    ]


def find_hints(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> tuple[Hint, ...]:
    """All that speaks for any init system in the guest, and what came of it."""
    traces = [
        hint for module in INIT_SYSTEMS for hint in find_traces(reader, module.NAME, module.TRACES)
    ]
    offered = [Hint(speaks_for=what, kind="boot", seen=seen) for what, seen in pid1.offered]
    return tuple(replace(hint, outcome=_outcome(hint, verdict)) for hint in (*traces, *offered))


def _outcome(hint: Hint, verdict: InitVerdict) -> str:
    """Why a hint decides nothing, or that it agrees."""
    if hint.kind == "boot":
        return "boots only where a person chooses it"
    if hint.speaks_for == verdict.system:
        return "agrees"
    if verdict.system is None:
        return "says what could run services, not what does"
    if hint.kind == "program":
        return f"nothing starts it as process 1, which is {verdict.pid1}"
    return f"{hint.speaks_for} would read it, and {verdict.system} runs the services"


def module_for(name: str) -> InitSystemModule:
    """The module of an init system.

    Raises:
        PlanError: there is none of this name.
    """
    modules: Mapping[str, InitSystemModule] = {module.NAME: module for module in INIT_SYSTEMS}
    if name not in modules:
        raise PlanError(
            f"{name} is not an init system that this version has a service for",
            hint=f"known are {', '.join(modules)}",
        )
    return modules[name]
