"""Answer with pages: made here, without anything that a browser has to run or to load elsewhere.

Text from guests, images and clients reaches a page only through ``{{ }}``.  There it is
escaped, and control and format characters are made visible.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import vmprovision
from vmprovision.errors import VmprovisionError, printable
from vmprovision.server.phases import PHASES
from vmprovision.server.problems import ProblemError, document_of
from vmprovision.server.services import services_of
from vmprovision.server.sessions import cookie_name, form_token

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from fastapi import Request

FOLDER = Path(__file__).with_name("static")
STATIC = {
    "style.css": "text/css",
    "live.js": "text/javascript",
    "htmx.min.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a page that is refreshed while the page is open.

    Attributes:
        name: its id in the page.
        template: the file that shows it.
        shows: the names of the page's values that the file uses.
        seconds: the time between two refreshes.
    """

    name: str
    template: str
    shows: tuple[str, ...]
    seconds: int = 2


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that answers every request with a page."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (ProblemError, VmprovisionError, RequestValidationError) as exc:
                return _error_page(request, document_of(exc))

        return answer


@cache
def static_file(name: str) -> bytes:
    """Return a static file of the pages."""
    return (FOLDER / name).read_bytes()


def _static_url(name: str) -> str:
    """Return a file's URL; it contains a hash of the content, so browsers may cache it."""
    return f"/static/{name}?v={hashlib.sha256(static_file(name)).hexdigest()[:12]}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vmprovision.server", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        phases=PHASES, static=_static_url, version=vmprovision.__version__, now=_now
    )
    environment.filters.update(
        moment=_moment, clock=_clock, percent=_percent, mebibytes=_mebibytes, duration=duration
    )
    return environment


def _shown(value: object) -> object:
    """Return the text of a value on a page."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _now() -> datetime:
    return datetime.now(tz=timezone.utc)


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _clock(at: datetime) -> str:
    return f"{at:%H:%M:%S}"


def _percent(value: float | None) -> str:
    return "\u2013" if value is None else f"{min(max(value, 0.0), 999.0):.0f} %"


def _mebibytes(mebibytes: float) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"  # noqa: PLR2004 -- the next unit


def duration(seconds: float) -> str:
    """Return a time span in the unit that suits it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


def session_of(request: Request) -> str:
    """Return the browser's session; empty if it has none."""
    return request.cookies.get(cookie_name(request.url.scheme), "")


def answer_page(
    request: Request, template: str, values: Mapping[str, Any], *, status: int = 200
) -> HTMLResponse:
    """Return a page."""
    page = _environment().get_template(template).render({**_context(request), **values})
    return HTMLResponse(page, status, headers={"Content-Security-Policy": POLICY})


def answer_live_page(
    request: Request,
    template: str,
    parts: tuple[Part, ...],
    sources: Mapping[str, Callable[[], object]],
) -> Response:
    """Return a page, or the part of it that a browser asks for; 204 if it has that already.

    Args:
        request: the browser's.
        template: the file that shows the page.
        parts: the page's.
        sources: give the page's values by name; a part asks only those that it shows.
    """
    wanted = request.query_params.get("part")
    for part in parts:
        if part.name == wanted:
            shown = {name: sources[name]() for name in part.shows}
            html, digest = _render_part(request, part, shown)
            if digest == request.query_params.get("seen"):
                return Response(status_code=204)
            return HTMLResponse(html, headers={"Content-Security-Policy": POLICY})
    values = {name: source() for name, source in sources.items()}
    rendered = {part.name: _render_part(request, part, values)[0] for part in parts}
    return answer_page(request, template, {**values, "parts": rendered, "is_live_page": True})


def _render_part(request: Request, part: Part, values: Mapping[str, Any]) -> tuple[Markup, str]:
    context = {**_context(request), **values}
    inner = Markup(_environment().get_template(part.template).render(context))  # noqa: S704 -- rendered with escapes
    digest = hashlib.sha256(inner.encode()).hexdigest()[:16]
    kept = {k: v for k, v in request.query_params.items() if k not in ("part", "seen")}
    query = urlencode({**kept, "part": part.name, "seen": digest})
    wrapper = _environment().get_template("part.html.j2")
    values = {"part": part, "url": f"?{query}", "inner": inner, "is_live": context["is_live"]}
    return Markup(wrapper.render(values)), digest  # noqa: S704 -- likewise


def _context(request: Request) -> dict[str, Any]:
    """Return the values that every page needs."""
    services = services_of(request)
    session = session_of(request)
    return {
        "path": request.url.path,
        "is_admin": request.state.role == "admin",
        "is_logged_in": request.state.role is not None and services.settings.tokens is not None,
        "is_live": request.query_params.get("live") != "no",
        "is_live_page": False,
        "form_token": form_token(services.store.installation, session),
    }


def _error_page(request: Request, document: dict[str, Any]) -> HTMLResponse:
    """Return a page with the error and the next step."""
    answer = answer_page(request, "error.html.j2", {"problem": document}, status=document["status"])
    if "hx-request" in request.headers and document["status"] == 404:  # noqa: PLR2004 -- the VM is gone
        answer.headers["HX-Redirect"] = "/"
    return answer
