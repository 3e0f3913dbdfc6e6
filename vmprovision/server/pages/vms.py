"""The pages of VMs: all of them, one, and the forms that create and delete."""

from __future__ import annotations

import re
import time
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from vmprovision.errors import VmprovisionError
from vmprovision.server.actions import vms as actions
from vmprovision.server.actions.creation import create_vm
from vmprovision.server.actions.lookup import require_vm
from vmprovision.server.files import vm_files
from vmprovision.server.models import CreateVm
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
from vmprovision.server.pages.views import (
    DEFAULT_RANGE,
    RANGES,
    SPARK_SECONDS,
    acts_of,
    badge_of,
    charts_of,
    lines_of,
    steps_of,
    summarize,
)
from vmprovision.server.problems import ProblemError
from vmprovision.server.queries import (
    list_events,
    list_recent_samples,
    list_samples,
    list_templates,
    list_vms,
)
from vmprovision.server.services import Served, Services  # noqa: TC001 -- FastAPI evaluates it

if TYPE_CHECKING:
    from typing import Any

    from vmprovision.server.models import Sample
    from vmprovision.server.pages.views import VmLine

router = APIRouter(route_class=PageRoute)

SAMPLES = 8640  # a day
CONSOLE_LINES = 60
EVENTS = 30

LIST_PARTS = (
    Part(name="summary", template="vms_summary.html.j2", shows=("summary",), seconds=3),
    Part(name="vms", template="vms_table.html.j2", shows=("lines", "templates")),
)
VM_PARTS = (
    Part(name="state", template="vm_state.html.j2", shows=("vm", "badge")),
    Part(name="acts", template="vm_acts.html.j2", shows=("vm", "acts")),
    Part(name="progress", template="vm_progress.html.j2", shows=("vm", "steps")),
    Part(name="agent", template="vm_agent.html.j2", shows=("vm", "latest"), seconds=5),
    Part(
        name="charts",
        template="vm_charts.html.j2",
        shows=("vm", "charts", "range", "ranges"),
        seconds=5,
    ),
    Part(name="console", template="vm_console.html.j2", shows=("console",), seconds=3),
    Part(name="events", template="vm_events.html.j2", shows=("events",), seconds=5),
)


@router.get("/")
def show_vms(request: Request, services: Served) -> Response:
    """Show all VMs."""
    found = list_vms(services.store)

    def lines() -> list[VmLine]:
        samples = list_recent_samples(services.store, begin=time.time() - SPARK_SECONDS)
        return lines_of(found, samples)

    sources = {
        "lines": lines,
        "summary": lambda: summarize(found),
        "templates": lambda: list_templates(services.store),
    }
    return answer_live_page(request, "vms.html.j2", LIST_PARTS, sources)


@router.get("/vms/new")
def show_form(request: Request, services: Served, template: str = "") -> Response:
    """Show the form that creates a VM."""
    return _form_page(request, services, {"template_id": template, "key": str(uuid.uuid4())})


def _form_page(
    request: Request, services: Services, form: Form, faults: Faults = NO_FAULTS
) -> Response:
    templates = [item for item in list_templates(services.store) if item.state != "deleting"]
    is_wrong = faults is not NO_FAULTS
    return answer_page(
        request,
        "vm_new.html.j2",
        {"form": form, "faults": faults, "templates": templates, "is_wrong": is_wrong},
        status=HTTPStatus.UNPROCESSABLE_ENTITY if is_wrong else HTTPStatus.OK,
    )


@router.post("/vms")
def create(request: Request, services: Served, form: PostedForm) -> Response:
    """Create a VM, once for each form however often it is sent, and show it."""
    values: dict[str, Any] = {
        "name": form.get("name", "").strip(),
        "template_id": form.get("template_id", ""),
        "vcpu": number(form.get("vcpu", "")),
        "mem_mib": number(form.get("mem_mib", "")),
        "tags": [tag.strip() for tag in form.get("tags", "").split(",") if tag.strip()],
    }
    wanted, faults = parse_fields(CreateVm, values)
    if not isinstance(wanted, CreateVm):
        return _form_page(request, services, form, faults)
    key = form.get("key", "")
    try:
        vm, _ = create_vm(services, wanted, key=key if re.fullmatch("[0-9a-f-]{36}", key) else None)
    except (ProblemError, VmprovisionError) as exc:
        form["key"] = str(uuid.uuid4())
        return _form_page(request, services, form, faults_of(exc))
    return RedirectResponse(f"/vms/{vm.id}", HTTPStatus.SEE_OTHER)


@router.get("/vms/{vm_id}")
def show_vm(request: Request, services: Served, vm_id: str) -> Response:
    """Show one VM."""
    vm = require_vm(services, vm_id)
    chosen = request.query_params.get("range", DEFAULT_RANGE)
    chosen = chosen if chosen in RANGES else DEFAULT_RANGE
    seconds = RANGES[chosen]

    def samples(limit: int) -> list[Sample]:
        begin = time.time() - seconds
        return list_samples(services.store, vm.id, begin=begin, limit=limit)

    files = vm_files(services.settings.state, vm.id)
    sources = {
        "vm": lambda: vm,
        "badge": lambda: badge_of(vm),
        "steps": lambda: steps_of(vm),
        "acts": lambda: acts_of(vm),
        "charts": lambda: charts_of(samples(SAMPLES), seconds),
        "latest": lambda: next(iter(samples(1)), None),
        "range": lambda: chosen,
        "ranges": lambda: list(RANGES),
        "console": lambda: files.console_lines(CONSOLE_LINES),
        "events": lambda: list_events(services.store, vm.id)[: -EVENTS - 1 : -1],
    }
    return answer_live_page(request, "vm.html.j2", VM_PARTS, sources)


@router.get("/vms/{vm_id}/delete")
def ask_before_delete(request: Request, services: Served, vm_id: str) -> Response:
    """Ask whether a VM is to be deleted."""
    vm = require_vm(services, vm_id)
    return answer_page(request, "vm_delete.html.j2", {"vm": vm, "badge": badge_of(vm)})


@router.post("/vms/{vm_id}/delete")
def delete(services: Served, vm_id: str, form: PostedForm) -> Response:  # noqa: ARG001 -- its token is checked
    """Delete a VM, and show the others."""
    actions.delete_vm(services, vm_id)
    return RedirectResponse("/", HTTPStatus.SEE_OTHER)


@router.post("/vms/{vm_id}/{act}")
def act_on(
    services: Served,
    vm_id: str,
    act: Literal["start", "stop", "pause", "resume"],
    form: PostedForm,  # noqa: ARG001 -- likewise
) -> Response:
    """Start, stop, pause or resume a VM, and show it."""
    ask = {
        "start": actions.start_vm,
        "stop": actions.stop_vm,
        "pause": actions.pause_vm,
        "resume": actions.resume_vm,
    }
    ask[act](services, vm_id)
    return RedirectResponse(f"/vms/{vm_id}", HTTPStatus.SEE_OTHER)
