"""Log in with a token, and out; the browser's cookie does not contain the token."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from vmprovision.server.pages.forms import PostedForm  # noqa: TC001 -- FastAPI evaluates it
from vmprovision.server.pages.rendering import PageRoute, answer_page
from vmprovision.server.services import Served  # noqa: TC001 -- likewise
from vmprovision.server.sessions import SECONDS, cookie_name, make_session

router = APIRouter(route_class=PageRoute)


def _own_path(wanted: str) -> str:
    """Return a path of this server: the wanted one, or the first page."""
    is_own = wanted.startswith("/") and not wanted.startswith(("//", "/\\"))
    return quote(wanted, safe="/%") if is_own else "/"


@router.get("/login")
def show_login(
    request: Request, services: Served, wanted: Annotated[str, Query(alias="next")] = "/"
) -> Response:
    """Ask for a token; without a token file none is needed."""
    if services.settings.tokens is None:
        return RedirectResponse("/", HTTPStatus.SEE_OTHER)
    return answer_page(request, "login.html.j2", {"next": _own_path(wanted), "is_wrong": False})


@router.post("/login")
def log_in(request: Request, services: Served, form: PostedForm) -> Response:
    """Start a session, and show the requested page."""
    tokens, following = services.settings.tokens, _own_path(form.get("next", "/"))
    if tokens is None:
        return RedirectResponse("/", HTTPStatus.SEE_OTHER)
    session = make_session(tokens, form.get("token", "").strip(), time.time())
    if session is None:
        values = {"next": following, "is_wrong": True}
        return answer_page(request, "login.html.j2", values, status=HTTPStatus.FORBIDDEN)
    answer = RedirectResponse(following, HTTPStatus.SEE_OTHER)
    scheme = request.url.scheme
    answer.set_cookie(
        cookie_name(scheme),
        session,
        max_age=SECONDS,
        path="/",
        secure=scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


@router.post("/logout")
def log_out(request: Request, form: PostedForm) -> Response:  # noqa: ARG001 -- its token is checked
    """End the session of this browser."""
    answer = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
    scheme = request.url.scheme
    answer.delete_cookie(
        cookie_name(scheme), path="/", secure=scheme == "https", httponly=True, samesite="strict"
    )
    return answer
