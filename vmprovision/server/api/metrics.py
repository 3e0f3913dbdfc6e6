"""The agents' metrics: the last day's samples, and their current answers."""

from __future__ import annotations

from datetime import datetime, timezone
from http import HTTPStatus
from typing import Annotated

from fastapi import Header, Query, Response

from vmprovision.server.actions.lookup import require_vm
from vmprovision.server.agents import JSON_TYPE, TEXT_TYPE, AgentError
from vmprovision.server.api import make_router, problems
from vmprovision.server.models import Sample  # noqa: TC001 -- FastAPI evaluates it
from vmprovision.server.problems import ProblemError, conflict
from vmprovision.server.queries import list_samples
from vmprovision.server.services import Served  # noqa: TC001 -- FastAPI evaluates it

router = make_router("metrics")

DEFAULT_LIMIT = 360  # an hour
LARGEST_LIMIT = 8640  # a day


@router.get("/metrics/vms/{vm_id}", responses=problems(404))
def history(
    vm_id: str,
    services: Served,
    begin: Annotated[datetime | None, Query(alias="from")] = None,
    end: Annotated[datetime | None, Query(alias="to")] = None,
    limit: Annotated[int, Query(ge=1, le=LARGEST_LIMIT)] = DEFAULT_LIMIT,
) -> list[Sample]:
    """Return the newest samples of a VM between two times; the last day is kept."""
    require_vm(services, vm_id)
    return list_samples(
        services.store,
        vm_id,
        begin=_seconds(begin, 0.0),
        end=_seconds(end, 1e12),
        limit=limit,
    )


def _seconds(moment: datetime | None, default: float) -> float:
    """Return a time as seconds since 1970; a time without a zone is in UTC."""
    if moment is None:
        return default
    aware = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return (aware - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()


@router.get(
    "/vms/{vm_id}/metrics",
    response_class=Response,
    responses={
        **problems(404, 409, 502),
        200: {"content": {JSON_TYPE: {}, TEXT_TYPE: {}}, "description": "The agent's own answer."},
    },
)
def current(
    vm_id: str, services: Served, accept: Annotated[str, Header(max_length=1000)] = JSON_TYPE
) -> Response:
    """Ask the VM's agent for `/metrics`, and pass its answer on."""
    vm = require_vm(services, vm_id)
    if vm.guest_ip is None or vm.phase != "ready":
        raise conflict(
            "the VM's agent is not ready", hint=f"GET /v1/vms/{vm_id}?wait=agent waits for it"
        )
    wanted = TEXT_TYPE if "text/plain" in accept else JSON_TYPE
    try:
        answer = services.agents.get(vm.guest_ip, "/metrics", accept=wanted)
    except AgentError as exc:
        raise ProblemError(
            HTTPStatus.BAD_GATEWAY,
            "AgentError",
            f"the agent at {vm.guest_ip} did not answer: {exc}",
            hint=f"GET /v1/vms/{vm_id} says whether the VM runs",
        ) from exc
    return Response(answer.content, media_type=answer.media_type)
