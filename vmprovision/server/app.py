"""Make the application: the API, its OpenAPI document, and the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

import vmprovision
from vmprovision.server.api import discovery, metrics, templates, vms
from vmprovision.server.models import Problem
from vmprovision.server.pages import router as pages_router
from vmprovision.server.problems import add_handlers

if TYPE_CHECKING:
    from typing import Any

    from vmprovision.server.services import Services

DESCRIPTION = """\
Create virtual machines over libvirt; the guest agent is in each of them when it starts.

Errors are problem details (RFC 9457): `kind` and `exit_code` are those of docs/exit-codes.md.
"""


class _Application(FastAPI):
    """FastAPI with the form of problems in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            form = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            document["components"]["schemas"][Problem.__name__] = form
            self.openapi_schema = document
        return self.openapi_schema


def make_app(services: Services) -> FastAPI:
    """Return the application that serves with these services; it starts no workers."""
    app = _Application(
        title="vmprovision",
        version=vmprovision.__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    add_handlers(app)
    for router in (
        templates.router,
        vms.router,
        metrics.router,
        discovery.router,
        discovery.plain_router,
        pages_router,
    ):
        app.include_router(router)
    return app
