"""Check every request before the application sees it: sender, origin, size and rate.

There are three kinds of attackers: a stranger on the network, a guest, and a web page in
the browser of a user of this server.  The page may forge a request, or use a host name
that leads here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import json
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from vmprovision.server.access import shown_token
from vmprovision.server.problems import MEDIA_TYPE, ProblemError
from vmprovision.server.sessions import cookie_name, role_of_session

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vmprovision.server.access import Role
    from vmprovision.server.settings import ServerSettings

BODY_BYTES = 64 << 10
REQUESTS_PER_SECOND = 200.0
BURST = 1000.0
CLIENTS_KEPT = 10_000
SAFE = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = ("/health",)
LOGIN_PATHS = ("/login", "/logout")  # and the files that these pages load
STATIC = "/static/"
# paths for programs; all others are pages
API = re.compile(r"/(?:v1/.*|health|metrics|openapi\.json)")
LOGINS_PER_SECOND = 0.5
LOGIN_BURST = 10.0
REPORT = re.compile(r"/v1/vms/[^/]+/guest-ip")


class _TooLargeError(Exception):
    """The body is longer than the limit for requests."""


class Buckets:
    """A rate limit for each client: a bucket that refills steadily."""

    def __init__(self, rate: float, burst: float) -> None:
        """Start with full buckets."""
        self._rate, self._burst = rate, burst
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client: str, now: float) -> bool:
        """Take one request from a client's bucket; return whether there was one left."""
        if len(self._levels) > CLIENTS_KEPT:
            self._levels.clear()
        level, since = self._levels.get(client, (self._burst, now))
        level = min(self._burst, level + (now - since) * self._rate)
        self._levels[client] = (level - 1 if level >= 1 else level, now)
        return level >= 1


class Gate:
    """An ASGI application in front of another one, which it protects."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        only_reports: bool = False,
    ) -> None:
        """Protect an application.

        Args:
            app: the application.
            settings: the server's settings.
            only_reports: accept agents' reports, and nothing else.
        """
        self._app = app
        self._settings = settings
        self._only_reports = only_reports
        self._buckets = Buckets(REQUESTS_PER_SECOND, BURST)
        self._logins = Buckets(LOGINS_PER_SECOND, LOGIN_BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or answer it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope, Headers(scope=scope))
            body = await _read(Headers(scope=scope), receive)
        except ProblemError as exc:
            await _answer(exc, send)
            return
        await self._app(scope, _replayed(body, receive), _hardened(send))

    def _check(self, scope: Scope, headers: Headers) -> None:
        path, method = scope["path"], scope["method"]
        _take(self._buckets, scope)
        is_report = method == "POST" and REPORT.fullmatch(path) is not None
        if self._only_reports:
            if not is_report and path not in OPEN_PATHS:
                raise ProblemError(
                    HTTPStatus.NOT_FOUND, "NotFound", "only agents' reports are accepted here"
                )
            return
        if is_report or path in OPEN_PATHS:
            return
        self._check_browser(scope, headers)
        role = self._role(scope, headers)
        scope.setdefault("state", {})["role"] = role
        if path in LOGIN_PATHS or path.startswith(STATIC):
            if method == "POST":
                _take(self._logins, scope)
            return
        _require(role, scope, headers)

    def _check_browser(self, scope: Scope, headers: Headers) -> None:
        """Refuse a request that another site's page sends through a browser."""
        host = headers.get("host", "")
        if self._settings.tokens is None and not _is_own_name(host):
            raise ProblemError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "MisdirectedRequest",
                "the request names another host than this server",
                hint="use its address, or localhost; with --token-file any name is accepted",
            )
        if scope["method"] in SAFE:
            return
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        is_other = site not in (None, "same-origin", "none")
        if is_other or (origin is not None and origin.partition("://")[2] != host):
            raise ProblemError(
                HTTPStatus.FORBIDDEN, "CrossSiteRequest", "another site's page sent this request"
            )

    def _role(self, scope: Scope, headers: Headers) -> Role | None:
        """Return the role of a request's sender, or None for a stranger.

        A browser's session may read everything. It may change something only through
        the pages' forms, which have their own token.
        """
        tokens = self._settings.tokens
        if tokens is None:
            return "admin"
        fields = headers.getlist("authorization")
        if fields:
            return tokens.role_of(shown_token(fields))
        if scope["method"] not in SAFE and API.fullmatch(scope["path"]):
            return None
        name = cookie_name(scope.get("scheme", "http"))
        session = cookie_parser(headers.get("cookie", "")).get(name, "")
        return role_of_session(tokens, session, time.time())


def _take(buckets: Buckets, scope: Scope) -> None:
    """Count a request of a client.

    Raises:
        ProblemError: the client sends too many requests.
    """
    client = scope.get("client")
    if client and not buckets.take(str(client[0]), time.monotonic()):
        raise ProblemError(
            HTTPStatus.TOO_MANY_REQUESTS,
            "TooManyRequests",
            "this client sends too many requests",
            hint="wait some seconds, and try again",
            headers={"Retry-After": "1"},
        )


def _require(role: Role | None, scope: Scope, headers: Headers) -> None:
    """Check that the sender of a request may make it.

    Raises:
        ProblemError: it may not; a browser is redirected to the login page.
    """
    if role == "admin" or (role == "read" and scope["method"] in SAFE):
        return
    if role == "read":
        raise ProblemError(HTTPStatus.FORBIDDEN, "Forbidden", "a read token cannot change anything")
    status, more = HTTPStatus.UNAUTHORIZED, {"WWW-Authenticate": 'Bearer realm="vmprovision"'}
    if not API.fullmatch(scope["path"]):
        login = f"/login?next={quote(scope['path'], safe='/')}"
        is_part = "hx-request" in headers  # for a part of a page, redirect the whole page
        status = HTTPStatus.UNAUTHORIZED if is_part else HTTPStatus.SEE_OTHER
        more = {"HX-Redirect": login} if is_part else {"Location": login}
    raise ProblemError(
        status,
        "Unauthorized",
        "this needs a token of the server's token file",
        hint="send it as 'Authorization: Bearer TOKEN', or log in at /login",
        headers=more,
    )


def _is_own_name(host: str) -> bool:
    """Return whether a Host field names this host by an address, or as localhost."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if name.lower() in ("localhost", ""):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


async def _read(headers: Headers, receive: Receive) -> bytes:
    """Return the whole body of a request.

    Raises:
        ProblemError: the body is too long.
    """
    too_large = ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "RequestTooLarge",
        f"the request has more than {BODY_BYTES >> 10} KiB",
    )
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdecimal() and int(length[:12]) > BODY_BYTES:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > BODY_BYTES:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that gives the body once, then the connection's messages."""
    left = [body]

    async def give() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return give


def _hardened(send: Send) -> Send:
    """Return a send function that adds the headers against sniffing and framing."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = message.get("headers", [])
            is_kept = any(name.lower() == b"cache-control" for name, _ in given)
            message["headers"] = [
                *given,
                (b"x-content-type-options", b"nosniff"),
                (b"x-frame-options", b"DENY"),
                # with no-referrer, browsers hide the origin of these pages' forms too
                (b"referrer-policy", b"same-origin"),
                *([] if is_kept else [(b"cache-control", b"no-store")]),
            ]
        await send(message)

    return send_on


async def _answer(problem: ProblemError, send: Send) -> None:
    body = json.dumps(problem.document()).encode()
    fields = [(name.lower(), value) for name, value in (problem.headers or {}).items()]
    headers = [("content-type", MEDIA_TYPE), ("content-length", str(len(body))), *fields]
    await send(
        {
            "type": "http.response.start",
            "status": problem.status.value,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        }
    )
    await send({"type": "http.response.body", "body": body})
