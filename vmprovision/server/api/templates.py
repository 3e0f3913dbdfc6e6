"""``/v1/templates``."""

from __future__ import annotations

from fastapi import Response  # noqa: TC002 -- FastAPI evaluates it

from vmprovision.server.actions import templates as actions
from vmprovision.server.actions.creation import instantiate as create_from
from vmprovision.server.actions.lookup import require_template
from vmprovision.server.api import make_router, problems
from vmprovision.server.api.vms import IdempotencyKey  # noqa: TC001 -- FastAPI evaluates it
from vmprovision.server.models import (
    Instantiate,
    TemplateAnswer,
    TemplateCreated,
    TemplateList,
    UpdateTemplate,
    VmCreated,
    WriteTemplate,
)
from vmprovision.server.queries import list_templates
from vmprovision.server.services import Served  # noqa: TC001 -- likewise

router = make_router("templates")


@router.post("/templates", status_code=201, responses=problems(409, 503, 507))
def create(wanted: WriteTemplate, services: Served, response: Response) -> TemplateCreated:
    """Register an image. It is inspected first; a guest that cannot be injected is refused.

    Afterwards a copy of it is injected once, for all VMs: `state` is then `ready`.
    """
    template = actions.create_template(services, wanted)
    response.headers["Location"] = f"/v1/templates/{template.id}"
    return TemplateCreated(id=template.id, item=template)


@router.get("/templates")
def list_(services: Served) -> TemplateList:
    """List all templates, by name."""
    return TemplateList(items=list_templates(services.store))


@router.get("/templates/{template_id}", responses=problems(404))
def get(template_id: str, services: Served) -> TemplateAnswer:
    """Show one template, by its id or its name."""
    return TemplateAnswer(item=require_template(services, template_id))


@router.put("/templates/{template_id}", responses=problems(404, 409, 503, 507))
def replace(template_id: str, wanted: WriteTemplate, services: Served) -> TemplateAnswer:
    """Replace what a template says. Its image can change only while no VM uses it."""
    return TemplateAnswer(item=actions.replace_template(services, template_id, wanted))


@router.patch("/templates/{template_id}", responses=problems(404, 409))
def update(template_id: str, wanted: UpdateTemplate, services: Served) -> TemplateAnswer:
    """Change a template's name or size; VMs that it has made keep theirs."""
    return TemplateAnswer(item=actions.update_template(services, template_id, wanted))


@router.delete("/templates/{template_id}", status_code=204, responses=problems(404, 409))
def delete(template_id: str, services: Served) -> None:
    """Delete a template that no VM uses."""
    actions.delete_template(services, template_id)


@router.post(
    "/templates/{template_id}/instantiate", status_code=202, responses=problems(404, 409, 410)
)
def instantiate(
    template_id: str,
    wanted: Instantiate,
    services: Served,
    idempotency_key: IdempotencyKey = None,
) -> VmCreated:
    """Create a VM from this template."""
    vm = create_from(services, template_id, wanted.name, idempotency_key)
    return VmCreated(id=vm.id, item=vm)
