"""Receive guests' reports to their manager, on loopback, during a proof."""

from __future__ import annotations

import collections
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from vmprovision.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

BODY_BYTES = 64 << 10
REPORTS_KEPT = 1000  # limit, because the guest decides how many it sends
REQUEST_SECONDS = 10.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One request that a guest made.

    Attributes:
        method: the request's method, usually "POST".
        path: the request's target, e.g. "/v1/vms/web-1/guest-ip".
        headers: by their names in lower case.
        body: the JSON value in the body, or None if it is not JSON.
        received: ``time.monotonic()`` of its arrival.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    received: float


class ReportListener:
    """The manager's side of the reports: an HTTP server on loopback that accepts every POST.

    It is a context manager, and listens from construction on. The requests come from an
    untrusted guest, so their size, number and duration are limited.
    """

    def __init__(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        self._reports: collections.deque[Report] = collections.deque(maxlen=REPORTS_KEPT)
        self._arrived = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _request_class(self._take))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> ReportListener:  # noqa: PYI034 -- typing.Self came with Python 3.11
        """Give the listener itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening."""
        self.close()

    @property
    def address(self) -> str:
        """``127.0.0.1:PORT``, as ``machine.boot`` expects it."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def reports(self) -> tuple[Report, ...]:
        """Return all reports so far, the first one first."""
        with self._arrived:
            return tuple(self._reports)

    def wait_for_reports(
        self, count: int, *, deadline: float, check: Callable[[], None] = lambda: None
    ) -> tuple[Report, ...]:
        """Wait for ``count`` reports; return them, or those that came before the deadline.

        Args:
            count: the number of reports.
            deadline: in seconds of ``time.monotonic()``.
            check: called while waiting; raises to stop, as ``Machine.check`` does.
        """
        while True:
            with self._arrived:
                left = deadline - time.monotonic()
                if len(self._reports) >= count or left <= 0:
                    return tuple(self._reports)
                self._arrived.wait(min(left, POLL_SECONDS))
            check()

    def close(self) -> None:
        """Stop listening; a second time does nothing."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, report: Report) -> None:
        with self._arrived:
            self._reports.append(report)
            self._arrived.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as the base class has it
        """Ignore it: a guest that breaks a connection is not an error of this host."""


def _request_class(take: Callable[[Report], None]) -> type[BaseHTTPRequestHandler]:
    class Request(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS

        def _answer(self) -> None:
            body = self._body()
            take(
                Report(
                    method=self.command,
                    path=printable(self.path),
                    headers={key.lower(): printable(text) for key, text in self.headers.items()},
                    body=body,
                    received=time.monotonic(),
                )
            )
            self.send_response(200 if self.command == "POST" else 405)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815 -- http.server's names

        def _body(self) -> Any:  # noqa: ANN401 -- any JSON value
            try:
                size = int(self.headers.get("Content-Length", "0"))
                if 0 < size <= BODY_BYTES:
                    return json.loads(self.rfile.read(size))
            except (ValueError, RecursionError):
                pass
            return None

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 -- as the base class has it
            """Print nothing."""

    return Request
