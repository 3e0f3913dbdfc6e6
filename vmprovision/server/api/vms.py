"""``/v1/vms``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator  # noqa: TC003 -- FastAPI evaluates it
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import Discriminator, Tag

from vmprovision.server.access import shown_token
from vmprovision.server.actions import vms as actions
from vmprovision.server.actions.creation import create_vm
from vmprovision.server.actions.lookup import require_vm
from vmprovision.server.api import make_router, problems
from vmprovision.server.models import (
    CreateVm,
    CreateVmOfImage,
    ReportAddress,
    UpdateVm,
    VmAnswer,
    VmCreated,
    VmList,
)
from vmprovision.server.phases import SETTLED
from vmprovision.server.queries import list_events, list_vms
from vmprovision.server.services import Served  # noqa: TC001 -- FastAPI evaluates it

router = make_router("vms")

LONGEST_WAIT = 600.0
POLL_SECONDS = 0.3
LAST_EVENT = (1 << 63) - 1


def _form(value: Any) -> str:  # noqa: ANN401 -- any JSON value
    """Return which of the two forms a request has."""
    is_image = isinstance(value, CreateVmOfImage) or (
        isinstance(value, dict) and "template_id" not in value and "rootfs_path" in value
    )
    return "image" if is_image else "template"


NewVm = Annotated[
    Annotated[CreateVm, Tag("template")] | Annotated[CreateVmOfImage, Tag("image")],
    Discriminator(_form),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="A second request with the same key and body makes no second VM.",
    ),
]


@router.post("/vms", status_code=202, responses=problems(409, 410, 503, 507))
def create(
    wanted: Annotated[NewVm, Body()],
    services: Served,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> VmCreated:
    """Create a VM. The answer comes at once; the VM is made and started afterwards."""
    vm, is_replay = create_vm(services, wanted, key=idempotency_key)
    response.headers["Location"] = f"/v1/vms/{vm.id}"
    if is_replay:
        response.headers["Idempotency-Replayed"] = "true"
    return VmCreated(id=vm.id, item=vm)


@router.get("/vms")
def list_(services: Served) -> VmList:
    """List all VMs, the newest first."""
    return VmList(items=list_vms(services.store))


@router.get("/vms/{vm_id}", responses=problems(404))
async def get(
    vm_id: str,
    services: Served,
    wait: Annotated[
        Literal["agent"] | None,
        Query(description="Answer when the agent answers, or cannot be expected to any more."),
    ] = None,
    timeout: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 60.0,
) -> VmAnswer:
    """Show one VM."""
    deadline = time.monotonic() + timeout
    while True:
        vm = await asyncio.to_thread(require_vm, services, vm_id)
        is_settled = vm.phase in SETTLED or vm.state == "failed" or vm.wanted == "deleted"
        if wait is None or is_settled or time.monotonic() >= deadline:
            return VmAnswer(item=vm)
        await asyncio.sleep(POLL_SECONDS)


def _existing(vm_id: str, services: Served) -> None:
    """Refuse to stream what does not exist, before the answer has begun."""
    require_vm(services, vm_id)


@router.get(
    "/vms/{vm_id}/events",
    response_class=EventSourceResponse,
    responses=problems(404),
    dependencies=[Depends(_existing)],
)
async def stream_events(
    vm_id: str,
    services: Served,
    last_event_id: Annotated[int, Header(ge=0, le=LAST_EVENT)] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Send what has happened to a VM, and what happens next, as server-sent events.

    The stream ends when the VM is gone.
    """
    after = last_event_id
    while True:
        found = await asyncio.to_thread(list_events, services.store, vm_id, after=after)
        for event in found:
            after = event.id
            document = event.model_dump(mode="json")
            yield ServerSentEvent(id=str(event.id), event=event.kind, data=document)
            if event.kind == "deleted":
                return
        await asyncio.sleep(POLL_SECONDS)


@router.patch("/vms/{vm_id}", responses=problems(404, 409))
def update(vm_id: str, wanted: UpdateVm, services: Served) -> VmAnswer:
    """Give a VM another name or other tags."""
    return VmAnswer(item=actions.update_vm(services, vm_id, wanted))


@router.delete("/vms/{vm_id}", status_code=202, responses=problems(404))
def delete(vm_id: str, services: Served) -> VmAnswer:
    """Delete a VM with its disk. The answer comes at once; the VM is gone some time later."""
    return VmAnswer(item=actions.delete_vm(services, vm_id))


@router.post("/vms/{vm_id}/start", status_code=202, responses=problems(404, 409))
def start(vm_id: str, services: Served) -> VmAnswer:
    """Start a VM; try again what has failed. A VM that runs is left as it is."""
    return VmAnswer(item=actions.start_vm(services, vm_id))


@router.post("/vms/{vm_id}/stop", status_code=202, responses=problems(404, 409))
def stop(vm_id: str, services: Served) -> VmAnswer:
    """Ask a guest to shut down; switch its machine off if it does not."""
    return VmAnswer(item=actions.stop_vm(services, vm_id))


@router.post("/vms/{vm_id}/pause", status_code=202, responses=problems(404, 409))
def pause(vm_id: str, services: Served) -> VmAnswer:
    """Let a running VM stand still."""
    return VmAnswer(item=actions.pause_vm(services, vm_id))


@router.post("/vms/{vm_id}/resume", status_code=202, responses=problems(404, 409))
def resume(vm_id: str, services: Served) -> VmAnswer:
    """Let a paused VM go on."""
    return VmAnswer(item=actions.resume_vm(services, vm_id))


@router.post("/vms/{vm_id}/guest-ip", responses=problems(404))
def report(
    vm_id: str, reported: ReportAddress, request: Request, services: Served
) -> dict[str, bool]:
    """Take an agent's report of its address, with the token of this VM only."""
    token = shown_token(request.headers.getlist("authorization"))
    actions.report_address(services, vm_id, reported.guest_ip, token)
    return {"success": True}
