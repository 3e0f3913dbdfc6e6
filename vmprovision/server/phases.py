"""The life of a VM: its next step, and its state in the clients' words.

A VM is created in the order of ``PHASES``. The owner's request (``wanted``) and
libvirt's state of the domain (``domain_state``) are separate facts. So no state that a
client sees describes something that was not observed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vmprovision.server.rows import Phase, VmRow

PHASES: tuple[Phase, ...] = (
    "requested",
    "disk",
    "injected",
    "defined",
    "started",
    "reporting",
    "ready",
)
# The guest has a machine that runs or ran, so these VMs are checked periodically.
WATCHED: tuple[Phase, ...] = ("started", "reporting", "ready", "silent")
BOOTING: tuple[Phase, ...] = ("started", "reporting")
SETTLED: tuple[Phase, ...] = ("ready", "silent")

StepName = Literal["make_disk", "inject", "define", "start", "watch", "delete", "rest"]
StateWord = Literal["running", "stopping", "stopped", "paused", "failed"]

_MAKING: dict[Phase, StepName] = {
    "requested": "make_disk",
    "disk": "inject",
    "injected": "define",
}


def next_step(vm: VmRow) -> StepName:
    """Return the step that brings a VM closer to what is wanted."""
    if vm.wanted == "deleted":
        return "delete"
    if vm.has_failed:
        return "rest"
    if vm.phase in WATCHED:
        return "watch"
    if vm.phase == "defined":
        return "rest" if vm.wanted == "stopped" else "start"
    return _MAKING[vm.phase]


def state_word(vm: VmRow) -> StateWord:
    """Return the VM's state in the words of NQRust-MicroVM's clients, and ``failed``."""
    if vm.has_failed or vm.phase == "silent":
        return "stopping" if vm.wanted == "deleted" else "failed"
    if vm.domain_state in ("running", "paused") and vm.wanted in ("stopped", "deleted"):
        return "stopping"
    if vm.wanted == "deleted":
        return "stopping"
    if vm.domain_state == "running":
        return "running"
    return "paused" if vm.domain_state == "paused" else "stopped"


def is_settled(vm: VmRow) -> bool:
    """Return whether waiting for the agent has ended, successfully or not."""
    return vm.has_failed or vm.phase in SETTLED or vm.wanted == "deleted"
