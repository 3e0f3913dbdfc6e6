"""Create VMs, once for each ``Idempotency-Key``, and never two with the same name."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from vmprovision.server.access import hash_token, new_token
from vmprovision.server.actions.lookup import plain, require_template
from vmprovision.server.actions.templates import inspected, new_template
from vmprovision.server.models import CreateVm
from vmprovision.server.problems import ProblemError, conflict, unprocessable
from vmprovision.server.queries import find_template_row, find_vm
from vmprovision.server.store import add_event
from vmprovision.server.tables import replies, templates, vms

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from vmprovision.guest.facts import GuestInfo
    from vmprovision.server.models import CreateVmOfImage, Vm
    from vmprovision.server.rows import TemplateRow
    from vmprovision.server.services import Services


def create_vm(
    services: Services, wanted: CreateVm | CreateVmOfImage, *, key: str | None = None
) -> tuple[Vm, bool]:
    """Write the row of a new VM; return the VM, and whether an earlier request had created it.

    Args:
        services: the server's services.
        wanted: the client's request.
        key: the client's ``Idempotency-Key``: a second request with it makes no second VM.

    Raises:
        ProblemError: the name is taken, the template cannot be used, or the key belongs to
            another request.
        VmprovisionError: the image cannot be used.
    """
    prepared: GuestInfo | None = None
    body = wanted.model_dump(mode="json")
    if not isinstance(wanted, CreateVm):
        earlier = _earlier(services, body, key)
        if earlier is not None:
            return earlier, True
        prepared = inspected(services, wanted.rootfs_path)

    def written(connection: Connection) -> str:
        if isinstance(wanted, CreateVm):
            template = _usable_template(connection, wanted.template_id)
            vcpu = template.vcpu if wanted.vcpu is None else wanted.vcpu
            memory = template.mem_mib if wanted.mem_mib is None else wanted.mem_mib
            return _insert_vm(connection, wanted.name, template.id, (vcpu, memory), wanted.tags)
        size = (wanted.vcpu, wanted.mem_mib)
        template_id = _insert_hidden_template(connection, wanted, prepared)
        return _insert_vm(connection, wanted.name, template_id, size, wanted.tags)

    vm_id, is_replay = _once(services, body, key, written)
    services.wake()
    found = find_vm(services.store, vm_id)
    if found is None:
        raise ProblemError(
            HTTPStatus.GONE,
            "Gone",
            f"the VM {vm_id} created with this Idempotency-Key was deleted",
            hint="use another key for another VM",
            more={"id": vm_id},
        )
    return found, is_replay


def instantiate(services: Services, template_id: str, name: str, key: str | None) -> Vm:
    """Create a VM from a template by its id, with all settings of the template.

    Raises:
        ProblemError: as ``create_vm``.
    """
    require_template(services, template_id)
    return create_vm(services, CreateVm(name=name, template_id=template_id), key=key)[0]


def _earlier(services: Services, body: dict[str, Any], key: str | None) -> Vm | None:
    """Return the VM that an earlier request with this key created, if it still exists."""
    if key is None:
        return None
    with services.store.read() as connection:
        vm_id = _reply(connection, _key_hash(key), _digest(body))
    return find_vm(services.store, vm_id) if vm_id else None


def _once(
    services: Services,
    body: dict[str, Any],
    key: str | None,
    write: Callable[[Connection], str],
) -> tuple[str, bool]:
    """Call ``write`` in a transaction, unless the key has created a VM; return the VM's id."""

    def attempt() -> tuple[str, bool]:
        with services.store.write() as connection:
            if key is not None:
                earlier = _reply(connection, _key_hash(key), _digest(body))
                if earlier is not None:
                    return earlier, True
            require_free_name(connection, str(body["name"]))
            vm_id = write(connection)
            if key is not None:
                values = {"key": _key_hash(key), "digest": _digest(body)}
                made = {"body": {"id": vm_id}, "created_at": time.time()}
                connection.execute(insert(replies).values({**values, **made}))
            return vm_id, False

    try:
        return attempt()
    except IntegrityError:  # another request was faster: use its result
        pass
    try:
        return attempt()
    except IntegrityError as exc:
        raise conflict("another request changed the same things at the same time") from exc


def _key_hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _reply(connection: Connection, key_hash: str, digest: str) -> str | None:
    """Return the id of the VM that a key has created.

    Raises:
        ProblemError: the key was used for another request.
    """
    row = connection.execute(select(replies).where(replies.c.key == key_hash)).one_or_none()
    if row is None:
        return None
    if row.digest != digest:
        raise ProblemError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "IdempotencyKeyReused",
            "this Idempotency-Key belongs to an earlier request with another body",
            hint="use a new key for every new request",
        )
    return str(row.body["id"])


def require_free_name(connection: Connection, name: str) -> None:
    """Check that no VM has this name.

    Raises:
        ProblemError: a VM has it.
    """
    holder = connection.scalar(select(vms.c.id).where(vms.c.name == name))
    if holder is not None:
        raise conflict(
            f"the name {name!r} belongs to VM {holder}", hint="choose another name, or delete it"
        )


def _usable_template(connection: Connection, id_or_name: str) -> TemplateRow:
    """Return a template, locked so that it cannot be deleted before the VM's row exists."""
    template = find_template_row(connection, plain(id_or_name), lock=True)
    if template is None or template.state == "deleting":
        raise unprocessable(
            f"there is no template {id_or_name[:80]}", hint="GET /v1/templates lists them"
        )
    if template.state == "failed":
        raise conflict(
            f"the template {template.name} could not be prepared",
            hint=f"GET /v1/templates/{template.id} says why",
        )
    return template


def _insert_vm(
    connection: Connection, name: str, template_id: str, size: tuple[int, int], tags: list[str]
) -> str:
    now, vm_id, token = time.time(), str(uuid.uuid4()), new_token()
    connection.execute(
        insert(vms).values(
            id=vm_id,
            name=name,
            template_id=template_id,
            vcpu=size[0],
            mem_mib=size[1],
            tags=tags,
            phase="requested",
            phase_at=now,
            wanted="running",
            evidence={"requested": {"at": now, "detail": "the request was recorded"}},
            token=token,
            token_hash=hash_token(token),
            due_at=now,
            created_at=now,
            updated_at=now,
        )
    )
    add_event(connection, vm_id, now, "requested", "the request was recorded")
    return vm_id


def _insert_hidden_template(
    connection: Connection, wanted: CreateVmOfImage, guest: GuestInfo | None
) -> str:
    """Write the template of a single VM, which is deleted with it."""
    template_id = str(uuid.uuid4())
    values = {
        "id": template_id,
        "name": f"image-of-{template_id}",
        "vcpu": wanted.vcpu,
        "mem_mib": wanted.mem_mib,
        "rootfs_path": wanted.rootfs_path,
        "image_format": None,
        "agent": "required",
        "is_hidden": True,
    }
    connection.execute(insert(templates).values({**values, **new_template(guest)}))
    return template_id
