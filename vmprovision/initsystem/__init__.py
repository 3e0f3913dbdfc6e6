"""One module for each init system that we have a service for.

A module offers ``NAME``; ``detect(reader, pid1)``, which gives the
verdict where this init system runs the guest's services; and
``service_operations(service, verdict)``, pure, which gives what it needs, the
enabling operation last; ``told`` and ``running_fault`` beside them.
``docs/adding-an-init-system.md`` shows how to add one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vmprovision.errors import PlanError
from vmprovision.guest import InitVerdict
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

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import PurePosixPath

    from vmprovision.filesystem import GuestReader
    from vmprovision.guest import InitSystem, Pid1
    from vmprovision.plan import Operation
    from vmprovision.rendering import Service


class InitSystemModule(Protocol):
    """What each module of this package offers."""

    NAME: InitSystem
    VARIANTS: tuple[tuple[str, PurePosixPath | None], ...]

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


def judge_init(reader: GuestReader, pid1: Pid1, *, told: InitSystem | None) -> InitVerdict:
    """Which init system runs the guest's services; ``system`` is None for those not known here."""
    if told is not None:
        return module_for(told).told(reader, pid1)
    for module in INIT_SYSTEMS:
        if verdict := module.detect(reader, pid1):
            return verdict
    return InitVerdict(system=None, pid1=pid1.program, confidence="certain", evidence=pid1.evidence)


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
