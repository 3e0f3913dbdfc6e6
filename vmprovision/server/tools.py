"""The tools that steps use, and the outcomes that they return."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.library import qemu_program
from vmprovision.errors import HypervisorError, VmprovisionError
from vmprovision.proof.machine import HARDWARE
from vmprovision.qemu.accelerator import choose_accelerator
from vmprovision.server.domain import BOARDS
from vmprovision.server.hypervisor import Hypervisor, HypervisorUnreachableError
from vmprovision.server.queries import find_template_row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.appliance.pool import Pool
    from vmprovision.batch.dask import Fleet
    from vmprovision.progress import Control
    from vmprovision.qemu.options import Accelerator
    from vmprovision.server.agents import AgentClient
    from vmprovision.server.rows import Phase, TemplateRow, VmRow
    from vmprovision.server.settings import ServerSettings
    from vmprovision.server.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a step.

    Attributes:
        changes: new values of the row's columns.
        due_in: seconds until the row needs work again.
        kind: the kind of event to write; empty for none.
        message: the event's message, a sentence.
        is_gone: whether the row must be deleted.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    due_in: float = 0.0
    kind: str = ""
    message: str = ""
    is_gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The parts of a server that its steps need.

    Attributes:
        hosts: libvirt, by its URIs.
        fleet: does the injections on other hosts, if given.
        control: cancels work when the server stops.
    """

    settings: ServerSettings
    store: Store
    agents: AgentClient
    hosts: Mapping[str, Hypervisor]
    pool: Pool | None
    fleet: Fleet | None
    control: Control

    def host_of(self, uri: str | None) -> Hypervisor:
        """Return the host of a VM.

        Raises:
            HypervisorError: the server was started without this host.
        """
        found = self.hosts.get(uri or "")
        if found is None:
            raise HypervisorError(
                f"this server does not know the host {uri}",
                hint=f"start it with --host {uri}",
            )
        return found

    def template_of(self, vm: VmRow) -> TemplateRow:
        """Return the template that a VM was made from.

        Raises:
            VmprovisionError: it is gone.
        """
        with self.store.read() as connection:
            found = find_template_row(connection, vm.template_id)
        if found is None:
            raise VmprovisionError(f"the template {vm.template_id} is gone")
        return found

    def qemu_owner(self) -> tuple[int, int] | None:
        """Return the user and group of QEMU on all hosts that can be reached; None if they differ.

        Raises:
            HypervisorError: no host can be reached.
        """
        found: set[tuple[int, int] | None] = set()
        error: HypervisorError | None = None
        for host in self.hosts.values():
            try:
                found.add(host.qemu_owner())
            except HypervisorUnreachableError as exc:  # noqa: PERF203 -- a connection each
                error = exc
        if not found and error is not None:
            raise error
        return next(iter(found)) if len(found) == 1 else None

    def best_host(self) -> Hypervisor:
        """Return the reachable host with the most free memory.

        Raises:
            HypervisorError: no host can be reached.
        """
        free: dict[str, int] = {}
        error: HypervisorError | None = None
        for uri, host in self.hosts.items():
            try:
                free[uri] = host.free_memory()
            except HypervisorUnreachableError as exc:  # noqa: PERF203 -- a connection each
                error = exc
        if not free:
            raise error or HypervisorError("there is no host", hint="give --host URI")
        return self.hosts[max(free, key=lambda uri: free[uri])]


def accelerator_of(host: Hypervisor, arch: str) -> Accelerator:
    """Return a machine's accelerator: KVM on this host only if it is known to work.

    Raises:
        HypervisorError: another host does not say whether it has KVM.
    """
    if not host.is_local:
        board = BOARDS.get(arch)
        return "kvm" if board is not None and host.has_kvm(board[0]) else "tcg"
    if arch in HARDWARE and platform.machine() not in HARDWARE[arch].natively:
        return "tcg"
    return choose_accelerator(qemu_program()).accelerator


def arrived(vm: VmRow, phase: Phase, detail: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 -- any column's value
    """Return the columns for a VM that has reached a phase, with the evidence."""
    now = time.time()
    evidence = {**vm.evidence, phase: {"at": now, "detail": detail}}
    return {
        "phase": phase,
        "phase_at": now,
        "evidence": evidence,
        "error": None,
        "attempts": 0,
        **more,
    }
