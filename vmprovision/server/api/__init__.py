"""The HTTP interface under ``/v1``: one router for each kind of thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from vmprovision.server.models import Problem
from vmprovision.server.problems import MEDIA_TYPE

if TYPE_CHECKING:
    from collections.abc import Mapping

_SENTENCES: Mapping[int, str] = {
    401: "No token, or one that is not known.",
    403: "The token does not allow this.",
    404: "There is no such thing.",
    409: "The present state forbids this.",
    410: "What an Idempotency-Key has made was deleted.",
    413: "The request is too large.",
    422: "The request, or the image that it names, cannot be used.",
    429: "Too many requests.",
    502: "The agent did not answer.",
    503: "libvirt or the appliance cannot be reached.",
    507: "The host's disk is full.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of an operation, as OpenAPI describes them."""
    reference = {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}
    return {
        status: {"description": _SENTENCES[status], "content": {MEDIA_TYPE: reference}}
        for status in sorted({401, 403, 413, 422, 429, *statuses})
    }


def make_router(tag: str) -> APIRouter:
    """Return an empty router for operations of one kind."""
    return APIRouter(prefix="/v1", tags=[tag], responses=problems())
