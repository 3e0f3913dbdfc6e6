"""Read the store for the API's answers and the pages. Nothing here writes."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from vmprovision.server.models import (
    Event,
    Evidence,
    Sample,
    SpecOfTemplate,
    Template,
    Vm,
)
from vmprovision.server.phases import BOOTING, state_word
from vmprovision.server.rows import template_row, vm_row
from vmprovision.server.tables import events, samples, templates, vms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

    from vmprovision.server.rows import TemplateRow, VmRow
    from vmprovision.server.store import Store

EVENTS_LIMIT = 1000


def moment(seconds: float) -> datetime:
    """Return a time of the store as an aware datetime."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc)


def _moment_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)


def list_vms(store: Store) -> list[Vm]:
    """Return every VM, the newest first."""
    with store.read() as connection:
        rows = connection.execute(_vms().order_by(vms.c.created_at.desc(), vms.c.id)).mappings()
        return [_vm(row) for row in rows]


def find_vm(store: Store, vm_id: str) -> Vm | None:
    """Return the VM with this id; None if there is none."""
    with store.read() as connection:
        row = connection.execute(_vms().where(vms.c.id == vm_id)).mappings().one_or_none()
        return _vm(row) if row else None


def read_vm_row(connection: Connection, vm_id: str, *, lock: bool = False) -> VmRow | None:
    """Return a VM's row, locked in this transaction if wanted, or None."""
    query = select(vms).where(vms.c.id == vm_id)
    found = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    return vm_row(found) if found else None


def find_template_row(
    connection: Connection, id_or_name: str, *, lock: bool = False
) -> TemplateRow | None:
    """Return the template with this id, else the one with this name, or None."""
    for column in (templates.c.id, templates.c.name):
        query = select(templates).where(column == id_or_name)
        query = query.with_for_update() if lock else query
        found = connection.execute(query).mappings().one_or_none()
        if found:
            return template_row(found)
    return None


def _vms() -> Any:  # noqa: ANN401 -- a select of many columns
    return select(
        vms,
        templates.c.name.label("template_name"),
        templates.c.rootfs_path.label("rootfs_path"),
    ).join(templates, vms.c.template_id == templates.c.id)


def _vm(row: Mapping[Any, Any]) -> Vm:
    values = dict(row)
    template_name, rootfs_path = values.pop("template_name"), values.pop("rootfs_path")
    vm = vm_row(values)
    return Vm(
        id=vm.id,
        name=vm.name,
        state=state_word(vm),
        phase=vm.phase,
        phase_at=moment(vm.phase_at),
        wanted=vm.wanted,
        template_id=vm.template_id,
        template_name=template_name,
        vcpu=vm.vcpu,
        mem_mib=vm.mem_mib,
        tags=vm.tags,
        host=vm.host,
        rootfs_path=rootfs_path,
        guest_ip=vm.guest_ip,
        reported_at=_moment_or_none(vm.reported_at),
        answered_at=_moment_or_none(vm.answered_at),
        evidence={
            phase: Evidence(at=moment(seen["at"]), detail=seen["detail"])
            for phase, seen in vm.evidence.items()
        },
        error=vm.error,
        created_at=moment(vm.created_at),
        updated_at=moment(vm.updated_at),
    )


def list_templates(store: Store) -> list[Template]:
    """Return every registered template, by name."""
    query = _templates().where(templates.c.is_hidden.is_(False)).order_by(templates.c.name)
    with store.read() as connection:
        return [_template(row) for row in connection.execute(query).mappings()]


def find_template(store: Store, id_or_name: str) -> Template | None:
    """Return the template with this id or name; None if there is none."""
    with store.read() as connection:
        found = find_template_row(connection, id_or_name)
        if found is None:
            return None
        query = _templates().where(templates.c.id == found.id)
        row = connection.execute(query).mappings().one_or_none()
        return _template(row) if row else None


def _templates() -> Any:  # noqa: ANN401 -- a select of many columns
    used = select(func.count()).where(vms.c.template_id == templates.c.id).scalar_subquery()
    return select(templates, used.label("vm_count"))


def _template(row: Mapping[Any, Any]) -> Template:
    values = dict(row)
    vm_count = values.pop("vm_count")
    template = template_row(values)
    return Template(
        id=template.id,
        name=template.name,
        state=template.state,
        spec=SpecOfTemplate(
            vcpu=template.vcpu,
            mem_mib=template.mem_mib,
            rootfs_path=template.rootfs_path,
            format=template.image_format,
            agent=template.agent,
        ),
        guest=template.guest,
        has_agent=template.has_agent,
        sha256=template.sha256,
        vm_count=vm_count,
        error=template.error,
        created_at=moment(template.created_at),
        updated_at=moment(template.updated_at),
    )


def list_events(
    store: Store, vm_id: str | None = None, *, after: int = 0, limit: int = EVENTS_LIMIT
) -> list[Event]:
    """Return the events of one VM or of all, in chronological order.

    Args:
        store: the database.
        vm_id: return only this VM's events.
        after: return only events after the one with this number.
        limit: the maximum number of events.
    """
    query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
    if vm_id is not None:
        query = query.where(events.c.vm_id == vm_id)
    with store.read() as connection:
        return [
            Event(
                id=row["id"],
                vm_id=row["vm_id"],
                at=moment(row["at"]),
                kind=row["kind"],
                message=row["message"],
            )
            for row in connection.execute(query).mappings()
        ]


def list_samples(
    store: Store,
    vm_id: str,
    *,
    begin: float = 0.0,
    end: float = 1e12,
    limit: int,
) -> list[Sample]:
    """Return the newest samples of a VM between two times, the oldest of them first."""
    query = (
        select(samples)
        .where(samples.c.vm_id == vm_id, samples.c.at >= begin, samples.c.at <= end)
        .order_by(samples.c.at.desc())
        .limit(limit)
    )
    with store.read() as connection:
        rows = list(connection.execute(query).mappings())
    return [_sample(row) for row in reversed(rows)]


def list_recent_samples(store: Store, *, begin: float) -> dict[str, list[Sample]]:
    """Return every VM's samples since a time, the oldest first, by the VM's id."""
    query = select(samples).where(samples.c.at >= begin).order_by(samples.c.at)
    found: dict[str, list[Sample]] = {}
    with store.read() as connection:
        for row in connection.execute(query).mappings():
            found.setdefault(row["vm_id"], []).append(_sample(row))
    return found


def _sample(row: Mapping[Any, Any]) -> Sample:
    values = dict(row)
    return Sample(recorded_at=moment(values.pop("at")), **values)


def count_booting(store: Store, host: str, since: float) -> int:
    """Return how many VMs of a host were started after a time, and have not answered yet."""
    query = select(func.count()).where(
        vms.c.host == host,
        vms.c.phase.in_(BOOTING),
        vms.c.domain_state == "running",
        vms.c.phase_at > since,
    )
    with store.read() as connection:
        return int(connection.scalar(query) or 0)


def count_by_phase(store: Store) -> dict[str, int]:
    """Return how many VMs are in each phase; those that failed count as ``failed``."""
    query = select(vms.c.phase, vms.c.has_failed, func.count()).group_by(
        vms.c.phase, vms.c.has_failed
    )
    counts: dict[str, int] = {}
    with store.read() as connection:
        for phase, has_failed, count in connection.execute(query):
            word = "failed" if has_failed else phase
            counts[word] = counts.get(word, 0) + count
    return counts
