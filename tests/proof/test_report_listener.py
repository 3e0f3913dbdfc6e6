"""The listener for reports, spoken to over real sockets."""

from __future__ import annotations

import http.client
import socket
import time
from typing import TYPE_CHECKING

import pytest

from vmprovision.proof.report_listener import BODY_BYTES, ReportListener

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def listener() -> Iterator[ReportListener]:
    """Return a listener on loopback."""
    with ReportListener() as opened:
        yield opened


def send(listener: ReportListener, body: bytes, method: str = "POST") -> int:
    """Return the status of one request's answer."""
    connection = http.client.HTTPConnection(listener.address, timeout=10)
    connection.request(method, "/v1/vms/one/guest-ip", body, {"Authorization": "Bearer x"})
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_report_is_kept_as_it_was_sent(listener: ReportListener) -> None:
    """Method, path, headers and the JSON body are what the guest sent."""
    assert send(listener, b'{"guest_ip": "10.0.2.15"}') == 200
    (report,) = listener.reports()
    assert (report.method, report.path) == ("POST", "/v1/vms/one/guest-ip")
    assert report.body == {"guest_ip": "10.0.2.15"}
    assert report.headers["authorization"] == "Bearer x"


@pytest.mark.parametrize("body", [b"", b"no json", b"\xff", b"[" * 5000, b" " * (BODY_BYTES + 1)])
def test_a_body_that_is_no_json_is_none(listener: ReportListener, body: bytes) -> None:
    """The listener survives any request of a guest."""
    assert send(listener, body) == 200
    assert listener.reports()[0].body is None
    assert send(listener, b"{}") == 200


def test_only_a_post_is_welcome(listener: ReportListener) -> None:
    """Another method is recorded, and refused."""
    assert send(listener, b"", "GET") == 405
    assert listener.reports()[0].method == "GET"


def test_waiting_ends_at_the_deadline(listener: ReportListener) -> None:
    """Reports that do not come are not waited for for ever."""
    assert listener.wait_for_reports(1, deadline=time.monotonic() + 0.3) == ()


def test_a_client_that_breaks_off_does_no_harm(
    listener: ReportListener, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reset connection is neither a report nor a traceback on the terminal."""
    host, port = listener.address.split(":")
    broken = socket.create_connection((host, int(port)))
    broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    broken.sendall(b"POST / HTTP/1.0\r\nContent-Length: 10\r\n\r\n123")
    broken.close()
    assert send(listener, b"{}") == 200
    assert capsys.readouterr().err == ""
