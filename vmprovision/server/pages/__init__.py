"""The pages for people; they read the store through ``queries`` and change it by ``actions``.

They are rendered on the server, work without JavaScript, and load nothing from other
hosts. htmx only refreshes parts of an open page.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vmprovision.server.pages import login, templates, vms
from vmprovision.server.pages.rendering import STATIC, PageRoute, answer_page, static_file
from vmprovision.server.problems import not_found

router = APIRouter(route_class=PageRoute, include_in_schema=False)
for part in (login.router, vms.router, templates.router):
    router.include_router(part)

DAY = 86400


@router.get("/static/{name}")
def serve_static(name: str) -> Response:
    """Send a static file of the pages."""
    if name not in STATIC:
        raise not_found(f"file {name[:80]}")
    headers = {"Cache-Control": f"public, max-age={DAY}"}
    return Response(static_file(name), media_type=STATIC[name], headers=headers)


@router.get("/docs")
def docs(request: Request) -> Response:
    """Show the API's document."""
    return answer_page(request, "docs.html.j2", request.app.openapi())
