"""The store: its migrations, and how servers take turns at its rows."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import update

from tests.server.shown import insert_vm
from vmprovision.server.actions.creation import create_vm
from vmprovision.server.actions.vms import delete_vm, stop_vm
from vmprovision.server.leases import (
    Lease,
    LostLeaseError,
    claim_building_vm,
    claim_watched_vm,
    finish,
    renew,
)
from vmprovision.server.models import CreateVm
from vmprovision.server.queries import count_booting, find_vm, list_events
from vmprovision.server.store import Store
from vmprovision.server.tables import metadata, vms

if TYPE_CHECKING:
    from vmprovision.server.rows import VmRow
    from vmprovision.server.services import Services
    from vmprovision.server.settings import ServerSettings


def created(services: Services, name: str = "test-vm") -> str:
    """Create a VM; return its id."""
    return create_vm(services, CreateVm(name=name, template_id="debian"))[0].id


def lease(vm: VmRow | None) -> Lease:
    """Return the lease of a VM that was claimed."""
    assert vm is not None
    assert vm.lease_owner is not None
    return Lease(table=vms, row_id=vm.id, owner=vm.lease_owner)


def expire(store: Store, vm_id: str) -> None:
    """Let a lease end now, as that of a killed server does after a while."""
    with store.write() as connection:
        connection.execute(update(vms).where(vms.c.id == vm_id).values(lease_until=0.0))


def test_the_migrations_make_the_tables(store: Store) -> None:
    """A change of a table without a migration is found here."""
    with store.write() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []


def test_two_servers_share_one_name(settings: ServerSettings, store: Store) -> None:
    """Domains are known again by a name that every server of a database has."""
    again = Store(settings.database)
    assert again.installation == store.installation
    again.close()


def test_a_row_is_worked_on_by_one(services: Services, store: Store) -> None:
    """Sixteen threads that claim at once get every VM, each one once."""
    wanted = {created(services, f"vm-{number}") for number in range(20)}
    claimed: list[str] = []

    def claim(owner: str) -> None:
        while (vm := claim_building_vm(store, owner, 60)) is not None:
            claimed.append(vm.id)

    threads = [threading.Thread(target=claim, args=(f"owner-{n}",)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(wanted)


def test_an_expired_lease_is_taken_over(services: Services, store: Store) -> None:
    """Another server takes a killed server's lease over; the first one's commits do not count."""
    vm_id = created(services)
    first = lease(claim_building_vm(store, "first", 60))
    assert claim_building_vm(store, "second", 60) is None
    expire(store, vm_id)
    second = lease(claim_building_vm(store, "second", 60))
    assert second.row_id == vm_id
    assert not renew(store, first, 60)
    with pytest.raises(LostLeaseError):
        finish(store, first, {"phase": "disk"}, due_at=0, kind="disk", message="made")
    vm = find_vm(store, vm_id)
    assert vm is not None
    assert vm.phase == "requested"
    assert [event.kind for event in list_events(store, vm_id)] == ["requested"]
    finish(store, second, {"phase": "disk"}, due_at=time.time() + 60, kind="disk", message="made")
    assert [event.kind for event in list_events(store, vm_id)] == ["requested", "disk"]


def test_a_renewed_lease_is_kept(services: Services, store: Store) -> None:
    """A step may take longer than a lease."""
    vm_id = created(services)
    held = lease(claim_building_vm(store, "first", 60))
    expire(store, vm_id)
    assert renew(store, held, 60)
    assert claim_building_vm(store, "second", 60) is None


def test_a_request_during_a_step_is_not_lost(services: Services, store: Store) -> None:
    """A row that somebody changed while it was worked on is due at once."""
    vm_id = created(services)
    held = lease(claim_building_vm(store, "first", 60))
    stop_vm(services, vm_id)
    finish(store, held, {"phase": "defined"}, due_at=time.time() + 3600)
    found = claim_building_vm(store, "first", 60)
    assert found is not None
    assert found.wanted == "stopped"


def test_lanes(services: Services, store: Store) -> None:
    """Making VMs never holds up looking at those that run; deleting belongs to making."""
    vm_id = created(services)
    assert claim_watched_vm(store, "watcher", 60) is None
    held = lease(claim_building_vm(store, "builder", 60))
    finish(store, held, {"phase": "started", "domain_state": "running"}, due_at=0)
    assert claim_building_vm(store, "builder", 60) is None
    watched = lease(claim_watched_vm(store, "watcher", 60))
    delete_vm(services, vm_id)
    finish(store, watched, {}, due_at=time.time() + 60)
    assert claim_watched_vm(store, "watcher", 60) is None
    assert lease(claim_building_vm(store, "builder", 60)).row_id == vm_id


def test_a_token_is_in_no_description(services: Services, store: Store) -> None:
    """Neither the row's text nor any answer has the token of an agent."""
    created(services)
    row = claim_building_vm(store, "first", 60)
    assert row is not None
    assert row.token
    assert row.token not in repr(row)
    assert row.token not in str(find_vm(store, row.id))


def test_the_machines_that_boot(store: Store) -> None:
    """Those of one host count, until their agents answer or for some time."""
    now = time.time()
    for phase in ("defined", "started", "reporting", "ready"):
        insert_vm(store, phase, phase, phase_at=now)
    insert_vm(store, "late", "reporting", phase_at=now - 1000)
    insert_vm(store, "ended", "reporting", phase_at=now, domain_state="off")
    insert_vm(store, "elsewhere", "started", phase_at=now, host="qemu+ssh://other/system")
    assert count_booting(store, "qemu:///system", now - 120) == 2
