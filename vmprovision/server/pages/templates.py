"""The pages of templates: all of them, and the forms that register and delete one."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from vmprovision.errors import VmprovisionError
from vmprovision.server.actions import templates as actions
from vmprovision.server.actions.lookup import require_template
from vmprovision.server.models import WriteTemplate
from vmprovision.server.pages.forms import (
    NO_FAULTS,
    Faults,
    Form,
    PostedForm,
    faults_of,
    number,
    parse_fields,
)
from vmprovision.server.pages.rendering import PageRoute, Part, answer_live_page, answer_page
from vmprovision.server.problems import ProblemError
from vmprovision.server.queries import list_templates
from vmprovision.server.services import Served, Services  # noqa: TC001 -- FastAPI evaluates it

router = APIRouter(route_class=PageRoute)

PARTS = (
    Part(name="templates", template="templates_list.html.j2", shows=("templates",), seconds=3),
)


@router.get("/templates")
def show_templates(request: Request, services: Served) -> Response:
    """Show all templates."""
    sources = {"templates": lambda: list_templates(services.store)}
    return answer_live_page(request, "templates.html.j2", PARTS, sources)


@router.get("/templates/new")
def show_form(request: Request, services: Served) -> Response:
    """Show the form that registers an image."""
    return _form_page(request, services, {})


def _form_page(
    request: Request, services: Services, form: Form, faults: Faults = NO_FAULTS
) -> Response:
    folders = [str(folder) for folder in services.settings.image_folders]
    is_wrong = faults is not NO_FAULTS
    return answer_page(
        request,
        "template_new.html.j2",
        {"form": form, "faults": faults, "folders": folders, "is_wrong": is_wrong},
        status=HTTPStatus.UNPROCESSABLE_ENTITY if is_wrong else HTTPStatus.OK,
    )


@router.post("/templates")
def create(request: Request, services: Served, form: PostedForm) -> Response:
    """Inspect and register an image, or say why that cannot be done."""
    sizes = {name: number(form.get(name, "")) for name in ("vcpu", "mem_mib")}
    spec = {
        "rootfs_path": form.get("rootfs_path", "").strip(),
        **{name: size for name, size in sizes.items() if size is not None},
    }
    values = {"name": form.get("name", "").strip(), "spec": spec}
    wanted, faults = parse_fields(WriteTemplate, values)
    if not isinstance(wanted, WriteTemplate):
        return _form_page(request, services, form, faults)
    try:
        actions.create_template(services, wanted)
    except (ProblemError, VmprovisionError) as exc:
        return _form_page(request, services, form, faults_of(exc))
    return RedirectResponse("/templates", HTTPStatus.SEE_OTHER)


@router.get("/templates/{template_id}/delete")
def ask_before_delete(request: Request, services: Served, template_id: str) -> Response:
    """Ask whether a template is to be deleted."""
    template = require_template(services, template_id)
    return answer_page(request, "template_delete.html.j2", {"template": template})


@router.post("/templates/{template_id}/delete")
def delete(services: Served, template_id: str, form: PostedForm) -> Response:  # noqa: ARG001 -- its token is checked
    """Delete a template, and show the others."""
    actions.delete_template(services, template_id)
    return RedirectResponse("/templates", HTTPStatus.SEE_OTHER)
