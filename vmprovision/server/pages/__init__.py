"""The pages for people; they read the store by ``queries`` and change it by ``actions``.

They are made here, on the server: they work without JavaScript, and load nothing from
anywhere else.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, select_autoescape

router = APIRouter(include_in_schema=False)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'self'"


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show the API's document."""
    environment = Environment(
        loader=PackageLoader("vmprovision.server", "pages"),
        autoescape=select_autoescape(default=True),
    )
    template = environment.get_template("docs.html.j2")
    page = template.render(request.app.openapi())
    return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})
