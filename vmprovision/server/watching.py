"""Watch the machine of a VM and its agent, to learn the actual state.

A VM is ``ready`` while its agent answers, and ``silent`` if the agent should answer but
does not. A silent guest that answers later is ready.
"""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert

from vmprovision.errors import HypervisorError, ImageSpaceError, ProofError
from vmprovision.server.agents import AgentError, sample_of
from vmprovision.server.files import vm_files
from vmprovision.server.problems import describe
from vmprovision.server.tables import samples
from vmprovision.server.tools import Outcome, arrived

if TYPE_CHECKING:
    from vmprovision.server.hypervisor import Hypervisor
    from vmprovision.server.rows import DomainState, VmRow
    from vmprovision.server.tools import Tools

LOOK_SECONDS = 1.0
SAMPLE_SECONDS = 10.0
SILENT_SECONDS = 30.0
PAUSED_SECONDS = 30.0
ROOM_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # failed checks of a ready guest before it is silent


def watch(tools: Tools, vm: VmRow) -> Outcome:
    """Bring the machine to the wanted state, and return its outcome.

    Raises:
        HypervisorError: libvirt cannot be reached, or another program removed the domain.
    """
    host = tools.host_of(vm.host)
    state = host.state_of(vm.id)
    if state == "absent":
        raise HypervisorError(
            f"the domain {vm.id} was removed from {host.uri} by another program",
            hint="delete the VM",
        )
    if state in ("off", "crashed"):
        return _ended(tools, vm, state)
    if vm.wanted == "stopped":
        return _stop(tools, vm, host, state)
    if "paused" in (vm.wanted, state):
        return _pause_or_resume(tools, vm, host)
    return _look_at_agent(tools, vm, state)


def _pause_or_resume(tools: Tools, vm: VmRow, host: Hypervisor) -> Outcome:
    changes: dict[str, Any] = {"answered_at": time.time(), "deadline_at": None}
    if vm.wanted == "paused":
        host.pause(vm.id)
        return Outcome(changes={**changes, "domain_state": "paused"}, due_in=PAUSED_SECONDS)
    if host.lacks_room(vm.id):
        disk = vm_files(tools.settings.state, vm.id).disk
        error = ImageSpaceError(
            f"the guest stands still: {disk} cannot grow, the host's disk is full",
            hint=f"make room: df -h {disk.parent} shows how much there is; it goes on by itself",
        )
        changes |= {"domain_state": "paused", "error": describe(error)}
        host.resume(vm.id)  # QEMU tries the write again
        is_news = vm.error is None
        return Outcome(
            changes=changes,
            due_in=ROOM_SECONDS,
            kind="trouble" if is_news else "",
            message=error.message,
        )
    host.resume(vm.id)
    return Outcome(changes={**changes, "domain_state": host.state_of(vm.id)})


def _look_at_agent(tools: Tools, vm: VmRow, state: DomainState) -> Outcome:
    """Check whether the agent of a running machine answers."""
    if vm.phase == "started":
        changes = arrived(vm, "reporting", "waiting for the agent's report")
        deadline = time.time() + tools.settings.report_seconds
        changes |= {"domain_state": state, "deadline_at": deadline}
        return Outcome(changes=changes, kind="reporting", message="waiting for the agent's report")
    if vm.phase == "ready":
        return _sample(tools, vm)
    return _await_agent(tools, vm)


def _ended(tools: Tools, vm: VmRow, state: DomainState) -> Outcome:
    """Return the outcome for a machine that is off: as wanted, by its guest, or too early."""
    off = {"domain_state": state, "stop_at": None, "deadline_at": None}
    if vm.wanted != "stopped" and vm.phase in ("started", "reporting"):
        reason = "its machine ended before the agent reported"
        return _silent(tools, vm, reason, off)
    if vm.wanted != "stopped" and vm.phase == "silent":
        return Outcome(changes=off, due_in=SILENT_SECONDS)
    is_own = vm.wanted != "stopped"
    message = "the guest switched itself off" if is_own else "the machine is off"
    changes = arrived(vm, "defined", message)
    changes |= {**off, "wanted": "stopped", "guest_ip": None, "reported_at": None}
    return Outcome(changes=changes, due_in=SILENT_SECONDS, kind="stopped", message=message)


def _stop(tools: Tools, vm: VmRow, host: Hypervisor, state: DomainState) -> Outcome:
    """Ask the guest to shut down; switch it off at the time limit."""
    now = time.time()
    if vm.stop_at is None and state == "running":
        host.shut_down(vm.id)
        changes: dict[str, Any] = {"domain_state": state}
        changes["stop_at"] = now + tools.settings.stop_seconds
        return Outcome(changes=changes, due_in=LOOK_SECONDS)
    if vm.stop_at is None or now >= vm.stop_at:
        host.switch_off(vm.id)
        return Outcome()
    return Outcome(due_in=LOOK_SECONDS)


def _await_agent(tools: Tools, vm: VmRow) -> Outcome:
    """Query the agent at its known address; give up on a guest that can no longer report."""
    later = SILENT_SECONDS if vm.phase == "silent" else LOOK_SECONDS
    running = {"domain_state": "running"}
    fault = ""
    if vm.guest_ip is not None:
        try:
            _require_in_network(tools, vm, vm.guest_ip)
            detail = tools.agents.identify(vm, vm.guest_ip)
        except AgentError as exc:
            fault = f"; it reported {vm.guest_ip}, and {exc}"
        else:
            changes = arrived(vm, "ready", detail)
            changes |= {**running, "answered_at": time.time(), "deadline_at": None}
            return Outcome(changes=changes, kind="ready", message=detail)
    if vm.phase == "silent":
        return Outcome(changes=running, due_in=later)
    if vm_files(tools.settings.state, vm.id).has_panicked():
        return _silent(tools, vm, "its kernel panicked", running)
    if vm.deadline_at is None:  # watched again, after a pause or a second start
        deadline = time.time() + tools.settings.report_seconds
        return Outcome(changes={**running, "deadline_at": deadline}, due_in=later)
    if time.time() > vm.deadline_at:
        seconds = f"{tools.settings.report_seconds:.0f}"
        return _silent(tools, vm, f"its agent did not come up within {seconds} s{fault}", running)
    return Outcome(changes=running, due_in=later)


def _require_in_network(tools: Tools, vm: VmRow, address: str) -> None:
    """Check that an address is in the guests' network, because a guest may report any address.

    Raises:
        AgentError: it is not.
    """
    try:
        network = tools.host_of(vm.host).network(tools.settings.network)
    except HypervisorError:
        return  # for a bridge, the host does not know the addresses
    own, subnet = ipaddress.ip_address(address), network.subnet
    if address == network.address or (own.version == subnet.version and own not in subnet):
        raise AgentError(f"that is not a guest's address in the network {subnet}")


def _silent(tools: Tools, vm: VmRow, reason: str, more: dict[str, Any]) -> Outcome:
    """Return the outcome for a silent guest, with its last console output."""
    lines = vm_files(tools.settings.state, vm.id).console_lines()
    error = ProofError(
        f"the guest is silent: {reason}",
        console=lines,
        hint=(
            f"read the console's last lines; POST /v1/vms/{vm.id}/start waits again, "
            "and boots it again after a stop"
        ),
    )
    error.image = Path(tools.template_of(vm).rootfs_path)
    changes = arrived(vm, "silent", reason) | more | {"error": describe(error)}
    return Outcome(changes=changes, due_in=SILENT_SECONDS, kind="silent", message=reason)


def _sample(tools: Tools, vm: VmRow) -> Outcome:
    """Store the agent's metrics; a guest whose agent stops answering becomes silent."""
    now = time.time()
    try:
        metrics = tools.agents.get_json(str(vm.guest_ip), "/metrics")
    except AgentError as exc:
        if now - (vm.answered_at or vm.phase_at) > PATIENCE_SECONDS:
            return _silent(tools, vm, f"its agent no longer answers: {exc}", {})
        return Outcome(due_in=LOOK_SECONDS)
    with tools.store.write() as connection:
        connection.execute(insert(samples).values(vm_id=vm.id, at=now, **sample_of(metrics)))
    changes = {"answered_at": now, "domain_state": "running", "error": None}
    return Outcome(changes=changes, due_in=SAMPLE_SECONDS)
