"""Change VMs: their wanted state, their names, and their agents' addresses."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from vmprovision.server.access import is_token
from vmprovision.server.actions.creation import require_free_name
from vmprovision.server.actions.lookup import is_id, no_vm, require_vm
from vmprovision.server.leases import wake
from vmprovision.server.problems import ProblemError, conflict
from vmprovision.server.queries import read_vm_row
from vmprovision.server.store import add_event
from vmprovision.server.tables import vms

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from vmprovision.server.models import UpdateVm, Vm
    from vmprovision.server.rows import VmRow
    from vmprovision.server.services import Services


def update_vm(services: Services, vm_id: str, wanted: UpdateVm) -> Vm:
    """Change a VM's name or tags.

    Raises:
        ProblemError: there is no such VM, or the name is taken.
    """
    changes = {k: v for k, v in wanted.model_dump().items() if v is not None}
    try:
        with services.store.write() as connection:
            vm = _living_vm(connection, vm_id)
            if wanted.name is not None and wanted.name != vm.name:
                require_free_name(connection, wanted.name)
            changes["updated_at"] = time.time()
            connection.execute(update(vms).where(vms.c.id == vm.id).values(changes))
    except IntegrityError as exc:
        raise conflict(f"the name {wanted.name!r} is taken") from exc
    return require_vm(services, vm_id)


def start_vm(services: Services, vm_id: str) -> Vm:
    """Request that a VM runs; try a failed or silent one again.

    Raises:
        ProblemError: there is no such VM.
    """

    def changes(vm: VmRow) -> dict[str, Any]:
        values: dict[str, Any] = {"wanted": "running", "stop_at": None}
        if vm.has_failed:
            values |= {"has_failed": False, "attempts": 0, "error": None}
        if vm.phase == "silent":
            values |= {"phase": "defined", "phase_at": time.time(), "error": None}
        return values

    return _want(services, vm_id, changes, "start")


def stop_vm(services: Services, vm_id: str) -> Vm:
    """Request that a VM is off: shut the guest down, and switch it off if it does not react.

    Raises:
        ProblemError: there is no such VM.
    """
    return _want(services, vm_id, lambda _: {"wanted": "stopped"}, "stop")


def pause_vm(services: Services, vm_id: str) -> Vm:
    """Request that a running VM is paused.

    Raises:
        ProblemError: there is no such VM, or it does not run.
    """

    def changes(vm: VmRow) -> dict[str, Any]:
        if vm.wanted != "paused" and (vm.domain_state != "running" or vm.wanted != "running"):
            raise conflict("the VM does not run", hint="start it first")
        return {"wanted": "paused"}

    return _want(services, vm_id, changes, "pause")


def resume_vm(services: Services, vm_id: str) -> Vm:
    """Request that a paused VM continues.

    Raises:
        ProblemError: there is no such VM, or it is not paused.
    """

    def changes(vm: VmRow) -> dict[str, Any]:
        if vm.wanted != "paused":
            raise conflict("the VM is not paused", hint="pause it first")
        return {"wanted": "running", "deadline_at": None}

    return _want(services, vm_id, changes, "resume")


def delete_vm(services: Services, vm_id: str) -> Vm:
    """Request the deletion of a VM: first its domain, then its files, then its row.

    Raises:
        ProblemError: there is no such VM.
    """
    if not is_id(vm_id):
        raise no_vm(vm_id)
    with services.store.write() as connection:
        vm = read_vm_row(connection, vm_id, lock=True)
        if vm is None:
            raise no_vm(vm_id)
        if vm.wanted != "deleted":
            connection.execute(wake(vms, vm_id, wanted="deleted", attempts=0))
            add_event(connection, vm_id, time.time(), "request", "delete")
    services.wake()
    return require_vm(services, vm_id)


def _want(
    services: Services, vm_id: str, changes: Callable[[VmRow], dict[str, Any]], word: str
) -> Vm:
    with services.store.write() as connection:
        vm = _living_vm(connection, vm_id)
        connection.execute(wake(vms, vm.id, **changes(vm)))
        add_event(connection, vm.id, time.time(), "request", word)
    services.wake()
    return require_vm(services, vm_id)


def _living_vm(connection: Connection, vm_id: str) -> VmRow:
    """Return a VM that is not being deleted, locked in this transaction."""
    vm = read_vm_row(connection, vm_id, lock=True) if is_id(vm_id) else None
    if vm is None:
        raise no_vm(vm_id)
    if vm.wanted == "deleted":
        raise conflict("the VM is being deleted")
    return vm


def report_address(services: Services, vm_id: str, address: str, token: str) -> Vm:
    """Record the address that an agent reports with its own token.

    Raises:
        ProblemError: there is no such VM, or the token is not this VM's.
    """
    now = time.time()
    if not is_id(vm_id):
        raise no_vm(vm_id)
    with services.store.write() as connection:
        vm = read_vm_row(connection, vm_id, lock=True)
        if vm is None or vm.wanted == "deleted":
            raise no_vm(vm_id)
        if not is_token(token, vm.token_hash) and not (
            services.settings.open_reports and not token
        ):
            raise ProblemError(
                HTTPStatus.UNAUTHORIZED,
                "Unauthorized",
                "this is not the token of this VM's agent",
                headers={"WWW-Authenticate": "Bearer"},
            )
        is_news = vm.guest_ip != address or vm.phase != "ready"
        values = {"guest_ip": address, "reported_at": now}
        if is_news:
            connection.execute(wake(vms, vm_id, **values))
        else:
            connection.execute(update(vms).where(vms.c.id == vm_id).values(values))
        if vm.guest_ip != address:
            add_event(connection, vm_id, now, "report", f"the agent reports {address}")
    if is_news:
        services.wake()
    return require_vm(services, vm_id)
