"""Errors for HTTP clients: problem details by RFC 9457.

``kind`` is the name of an error class in docs/exit-codes.md, with its ``exit_code``, or
one of the few names that exist only in HTTP, such as ``NotFound``.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vmprovision import errors
from vmprovision.errors import VmprovisionError, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
TYPE = "urn:vmprovision:problem:"
FAULTS_SHOWN = 20

# Causes that the client can fix; all others are this host's.
_STATUSES: tuple[tuple[type[VmprovisionError], HTTPStatus], ...] = (
    (errors.ImageSpaceError, HTTPStatus.INSUFFICIENT_STORAGE),
    (errors.ImageLockedError, HTTPStatus.CONFLICT),
    (errors.ImageError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.InspectionError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.UnsupportedGuestError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.PlanError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.ApplyError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.BundledRuntimeError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (errors.HypervisorError, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.ApplianceError, HTTPStatus.SERVICE_UNAVAILABLE),
    (errors.FleetError, HTTPStatus.SERVICE_UNAVAILABLE),
)


class ProblemError(Exception):
    """A request that cannot be served, in HTTP's own words."""

    def __init__(  # noqa: PLR0913 -- the members of a problem
        self,
        status: HTTPStatus,
        kind: str,
        detail: str,
        *,
        hint: str = "",
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the parts of the problem."""
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = printable(detail)
        self.hint = printable(hint)
        self.headers = headers
        self.more = dict(more or {})

    def document(self) -> dict[str, Any]:
        """Return the problem as an RFC 9457 document."""
        return {
            "type": TYPE + self.kind,
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.detail,
            "kind": self.kind,
            "hint": self.hint,
            **self.more,
        }


def not_found(what: str) -> ProblemError:
    """Return the problem for something that does not exist."""
    return ProblemError(HTTPStatus.NOT_FOUND, "NotFound", f"there is no {what}")


def conflict(detail: str, *, hint: str = "") -> ProblemError:
    """Return the problem for a request that the present state forbids."""
    return ProblemError(HTTPStatus.CONFLICT, "Conflict", detail, hint=hint)


def unprocessable(detail: str, *, hint: str = "") -> ProblemError:
    """Return the problem for a request whose content cannot be used."""
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, "InvalidRequest", detail, hint=hint)


def status_of(error: VmprovisionError) -> HTTPStatus:
    """Return the HTTP status of an error of vmprovision."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR


def describe(error: VmprovisionError) -> dict[str, Any]:
    """Return an error of vmprovision as a problem, for answers and for items in them."""
    document = error.as_json()
    kind = document.pop("kind")
    status = status_of(error)
    return {
        "type": TYPE + kind,
        "title": status.phrase,
        "status": status.value,
        "detail": document.pop("message"),
        "kind": kind,
        "hint": document.pop("hint"),
        "exit_code": error.exit_code,
        **document,
    }


def document_of(
    error: ProblemError | VmprovisionError | RequestValidationError,
) -> dict[str, Any]:
    """Return the reason for a refused request as a problem."""
    if isinstance(error, VmprovisionError):
        return describe(error)
    return (_invalid(error) if isinstance(error, RequestValidationError) else error).document()


def _respond(document: dict[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(document, document["status"], headers=headers, media_type=MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Make an application answer every error with a problem."""

    @app.exception_handler(ProblemError)
    def _of_http(_: Request, exc: ProblemError) -> JSONResponse:
        return _respond(document_of(exc), exc.headers)

    @app.exception_handler(VmprovisionError)
    @app.exception_handler(RequestValidationError)
    def _of_ours(_: Request, exc: VmprovisionError | RequestValidationError) -> JSONResponse:
        return _respond(document_of(exc))

    @app.exception_handler(HTTPException)
    def _of_routing(_: Request, exc: HTTPException) -> JSONResponse:
        status = HTTPStatus(exc.status_code)
        kind = status.phrase.title().replace(" ", "")
        return _respond(ProblemError(status, kind, str(exc.detail)).document(), exc.headers)

    @app.exception_handler(Exception)
    def _of_a_fault(_: Request, exc: Exception) -> JSONResponse:
        log.error("unexpected fault", exc_info=exc)
        return _respond(describe(errors.unexpected_error(exc)))


def _invalid(exc: RequestValidationError) -> ProblemError:
    """Return the faults of a request, each with its place."""
    faults = [
        {
            "pointer": "/" + "/".join(printable(str(part))[:80] for part in fault["loc"]),
            "message": printable(str(fault["msg"]))[:300],
        }
        for fault in exc.errors()[:FAULTS_SHOWN]
    ]
    detail = "; ".join(f"{fault['pointer']}: {fault['message']}" for fault in faults)
    return ProblemError(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "InvalidRequest",
        detail[:1000],
        hint="the form of every request is at /docs",
        more={"errors": faults},
    )
