"""Let servers take turns at rows: lease a row, renew the lease, commit the work.

A lease is fenced: a server's commit counts only while it still holds the lease. The
lease of a killed server expires, and another server continues.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, case, delete, or_, select, update

from vmprovision.server.phases import WATCHED
from vmprovision.server.rows import TemplateRow, VmRow, template_row, vm_row
from vmprovision.server.store import add_event
from vmprovision.server.tables import templates, vms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import ColumnElement, Table

    from vmprovision.server.store import Store

NEVER = 1e12  # seconds since 1970; for a row without work


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one server to work on one row for some time."""

    table: Table
    row_id: str
    owner: str


class LostLeaseError(Exception):
    """Another server has taken the row over, so this server's work does not count."""


def claim_building_vm(store: Store, owner: str, seconds: float) -> VmRow | None:
    """Lease a VM that must be created or deleted; return None if there is none."""
    lane = or_(vms.c.phase.not_in(WATCHED), vms.c.wanted == "deleted")
    found = _claim(store, vms, lane, owner, seconds)
    return vm_row(found) if found else None


def claim_watched_vm(store: Store, owner: str, seconds: float) -> VmRow | None:
    """Lease a VM whose machine must be checked; return None if there is none."""
    lane = and_(vms.c.phase.in_(WATCHED), vms.c.wanted != "deleted")
    found = _claim(store, vms, lane, owner, seconds)
    return vm_row(found) if found else None


def claim_template(store: Store, owner: str, seconds: float) -> TemplateRow | None:
    """Lease a template that must be prepared or deleted; return None if there is none."""
    lane = templates.c.state.in_(("preparing", "deleting"))
    found = _claim(store, templates, lane, owner, seconds)
    return template_row(found) if found else None


def _claim(
    store: Store, table: Table, lane: ColumnElement[bool], owner: str, seconds: float
) -> Mapping[Any, Any] | None:
    """Lease the row that has waited longest.

    A leased row is never due, so ``due_at`` shows whether work on it was requested
    meanwhile. A row with an expired lease is due at once.
    """
    now = time.time()
    is_due = or_(table.c.due_at <= now, table.c.lease_owner.is_not(None))
    wanted = (
        select(table.c.id)
        .where(lane, is_due, table.c.lease_until <= now)
        .order_by(table.c.due_at)
        .limit(1)
    )
    with store.read() as connection:  # a read does not lock SQLite's file
        if connection.scalar(wanted) is None:
            return None
    with store.write() as connection:
        row_id = connection.scalar(wanted.with_for_update(skip_locked=True))
        if row_id is None:
            return None
        connection.execute(
            update(table)
            .where(table.c.id == row_id)
            .values(lease_owner=owner, lease_until=now + seconds, due_at=NEVER)
        )
        return connection.execute(select(table).where(table.c.id == row_id)).mappings().one()


def renew(store: Store, lease: Lease, seconds: float) -> bool:
    """Extend a lease; return whether this server still holds it."""
    with store.write() as connection:
        return bool(
            connection.execute(
                update(lease.table)
                .where(lease.table.c.id == lease.row_id, lease.table.c.lease_owner == lease.owner)
                .values(lease_until=time.time() + seconds)
            ).rowcount
        )


def finish(  # noqa: PLR0913 -- what a step has to say
    store: Store,
    lease: Lease,
    changes: Mapping[str, Any],
    *,
    due_at: float,
    kind: str = "",
    message: str = "",
) -> None:
    """Commit the result of a step, and release the row.

    Args:
        store: the database.
        lease: the row's lease.
        changes: new values of columns.
        due_at: when the row needs work again, unless work was requested earlier.
        kind: the kind of event to write with it; empty for none.
        message: the event's message.

    Raises:
        LostLeaseError: another server has the lease; nothing was committed.
    """
    table, now = lease.table, time.time()
    sooner = case((table.c.due_at < due_at, table.c.due_at), else_=due_at)
    with store.write() as connection:
        done = connection.execute(
            update(table)
            .where(table.c.id == lease.row_id, table.c.lease_owner == lease.owner)
            .values(lease_owner=None, lease_until=0.0, due_at=sooner, updated_at=now, **changes)
        )
        if not done.rowcount:
            raise LostLeaseError(lease.row_id)
        if kind:
            add_event(connection, lease.row_id, now, kind, message)


def forget(store: Store, lease: Lease, kind: str, message: str) -> None:
    """Delete the row of something that no longer exists.

    Raises:
        LostLeaseError: another server has the lease; nothing was deleted.
    """
    table = lease.table
    with store.write() as connection:
        done = connection.execute(
            delete(table).where(table.c.id == lease.row_id, table.c.lease_owner == lease.owner)
        )
        if not done.rowcount:
            raise LostLeaseError(lease.row_id)
        if kind:
            add_event(connection, lease.row_id, time.time(), kind, message)


def wake(table: Table, row_id: str, **values: Any) -> Any:  # noqa: ANN401 -- a statement, and any column's value
    """Return the statement that changes a row and requests work on it."""
    now = time.time()
    return update(table).where(table.c.id == row_id).values(due_at=now, updated_at=now, **values)
