"""Register, change and delete templates."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError

from vmprovision.errors import InspectionError, PlanError, UnsupportedGuestError
from vmprovision.server.access import permitted_image
from vmprovision.server.actions.lookup import no_template, plain, require_template
from vmprovision.server.leases import wake
from vmprovision.server.problems import conflict
from vmprovision.server.queries import find_template_row
from vmprovision.server.tables import templates, vms

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from vmprovision.guest.facts import GuestInfo
    from vmprovision.server.models import Template, TemplateSpec, UpdateTemplate, WriteTemplate
    from vmprovision.server.services import Services


def create_template(services: Services, wanted: WriteTemplate) -> Template:
    """Inspect an image, and write the row of a template that will be prepared from it.

    Raises:
        ProblemError: the name is taken.
        VmprovisionError: the image cannot be injected.
    """
    guest = _inspected_for(services, wanted.spec)
    template_id = str(uuid.uuid4())
    values = {"id": template_id, **_template_values(wanted), **new_template(guest)}
    try:
        with services.store.write() as connection:
            connection.execute(insert(templates).values(values))
    except IntegrityError as exc:
        raise conflict(
            f"the template {wanted.name!r} exists already", hint="PUT replaces it"
        ) from exc
    services.wake()
    return require_template(services, template_id)


def replace_template(services: Services, id_or_name: str, wanted: WriteTemplate) -> Template:
    """Change a template's name, size or image; existing VMs keep theirs.

    Raises:
        ProblemError: there is no such template, the name is taken, or VMs use its image.
        VmprovisionError: the image cannot be injected.
    """
    template = require_template(services, id_or_name)
    values = _template_values(wanted)
    image = ("rootfs_path", "image_format", "agent")
    kept = (template.spec.rootfs_path, template.spec.format, template.spec.agent)
    if tuple(values[name] for name in image) != kept:
        values |= new_template(_inspected_for(services, wanted.spec))
        del values["created_at"]
    return _change_template(services, template.id, values, renews="state" in values)


def update_template(services: Services, id_or_name: str, wanted: UpdateTemplate) -> Template:
    """Change a template's name or size.

    Raises:
        ProblemError: there is no such template, or the name is taken.
    """
    template = require_template(services, id_or_name)
    values = wanted.spec.model_dump(exclude_none=True) if wanted.spec else {}
    if wanted.name is not None:
        values["name"] = wanted.name
    return _change_template(services, template.id, values, renews=False)


def _change_template(
    services: Services, template_id: str, values: dict[str, Any], *, renews: bool
) -> Template:
    try:
        with services.store.write() as connection:
            row = find_template_row(connection, template_id, lock=True)
            if row is None or row.state == "deleting":
                raise no_template(template_id)
            if renews and (row.lease_owner or _count_vms(connection, template_id)):
                raise conflict(
                    "VMs use the image of this template, or it is just being prepared",
                    hint="register the other image as a new template",
                )
            changed = {"updated_at": time.time(), **values}
            connection.execute(
                update(templates).where(templates.c.id == template_id).values(changed)
            )
    except IntegrityError as exc:
        raise conflict(f"the name {values.get('name')!r} is taken") from exc
    services.wake()
    return require_template(services, template_id)


def delete_template(services: Services, id_or_name: str) -> None:
    """Delete a template that no VM uses: mark its row, then delete its files, then the row.

    Raises:
        ProblemError: there is no such template, or VMs use it.
    """
    with services.store.write() as connection:
        row = find_template_row(connection, plain(id_or_name), lock=True)
        if row is None:
            raise no_template(id_or_name)
        count = _count_vms(connection, row.id)
        if count:
            raise conflict(f"{count} VMs use this template", hint="delete them first")
        connection.execute(wake(templates, row.id, state="deleting", attempts=0))
    services.wake()


def release_hidden_template(connection: Connection, template_id: str) -> None:
    """Mark the template of one VM for deletion, after that VM's row is gone."""
    connection.execute(
        update(templates)
        .where(templates.c.id == template_id, templates.c.is_hidden.is_(True))
        .values(state="deleting", due_at=time.time(), attempts=0)
    )


def _count_vms(connection: Connection, template_id: str) -> int:
    query = select(func.count()).select_from(vms).where(vms.c.template_id == template_id)
    return int(connection.scalar(query) or 0)


def _template_values(wanted: WriteTemplate) -> dict[str, Any]:
    return {
        "name": wanted.name,
        "vcpu": wanted.spec.vcpu,
        "mem_mib": wanted.spec.mem_mib,
        "rootfs_path": wanted.spec.rootfs_path,
        "image_format": wanted.spec.format,
        "agent": wanted.spec.agent,
    }


def new_template(guest: GuestInfo | None) -> dict[str, Any]:
    """Return the columns of a template that must be prepared."""
    now = time.time()
    return {
        "state": "preparing",
        "guest": _guest_facts(guest) if guest else {},
        "boot": None,
        "has_agent": False,
        "sha256": None,
        "error": None,
        "due_at": now,
        "attempts": 0,
        "created_at": now,
        "updated_at": now,
    }


def _guest_facts(guest: GuestInfo) -> dict[str, Any]:
    """Return the facts about its guest that a template shows."""
    facts = guest.as_json()
    return {
        "product_name": guest.distribution.product_name,
        "arch": guest.arch,
        "init": facts["init"],
    }


def _inspected_for(services: Services, spec: TemplateSpec) -> GuestInfo | None:
    """Return the guest of an image, or None if it has no agent and needs none."""
    try:
        return inspected(services, spec.rootfs_path, spec.format)
    except (InspectionError, UnsupportedGuestError, PlanError):
        if spec.agent == "required":
            raise
        return None


def inspected(services: Services, path: str, image_format: str | None = None) -> GuestInfo:
    """Return the guest of an image, after checking that it can be injected.

    Raises:
        VmprovisionError: it cannot be injected; the error says why.
    """
    image = permitted_image(path, services.settings.image_folders)
    return services.inspect(image, image_format)
