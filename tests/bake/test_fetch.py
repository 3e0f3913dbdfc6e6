"""Downloads from a real HTTPS server on loopback: resumed, checked, and from nowhere else."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import ipaddress
import re
import ssl
import subprocess
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from vmprovision.bake.fetch import download
from vmprovision.errors import CancelledError, SourceError
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """A web server, what it does wrong, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    breaks_after: list[int] = field(default_factory=list)  # bytes, of one request after another
    has_ranges: bool = True
    redirect: str = ""
    status: int = 0
    asked: list[str | None] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the ``Server`` of its class says."""

    server_of: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send the content, from where the client wants it, as far as the connection holds."""
        server = self.server_of
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if server.status or server.redirect:
            self.send_response(server.status or 302)
            self.send_header("Location", server.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "") if server.has_ranges else None
        start, size = int(match[1]) if match else 0, len(server.content)
        if match and start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        end = start + server.breaks_after.pop(0) if server.breaks_after else size
        self.wfile.write(server.content[start:end])
        if end < size:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-addext", f"subjectAltName=IP:{ipaddress.IPv4Address('127.0.0.1')}"),
            *("-keyout", path, "-out", path.with_suffix(".crt")),
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


@pytest.fixture
def server(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running HTTPS server that this process trusts, and an empty cache."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    described = Server()
    handler = type("Handler", (Handler,), {"server_of": described})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        web.socket = context.wrap_socket(web.socket, server_side=True)
        described.url = f"https://127.0.0.1:{web.server_port}/images/guest.qcow2"
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield described
        finally:
            web.shutdown()
            thread.join()


def test_a_file_is_downloaded_once(server: Server) -> None:
    """The second time it comes from the cache; a damaged one there is downloaded again."""
    path = download(server.url, SHA256, Control())
    assert path.name == "guest.qcow2"
    assert path.read_bytes() == CONTENT
    assert download(server.url, SHA256, Control()) == path
    assert server.asked == [None]
    path.write_bytes(CONTENT[:-1] + b"!")
    assert download(server.url, SHA256, Control()).read_bytes() == CONTENT
    assert server.asked == [None, None]


def test_a_broken_connection_is_resumed(server: Server) -> None:
    """Nothing is sent twice: each request begins where the last one broke."""
    server.breaks_after = [2_000_000, 1_000_000]
    path = download(server.url, SHA256, Control())
    assert path.read_bytes() == CONTENT
    first, second, third = server.asked
    assert first is None
    starts = [int(re.fullmatch(r"bytes=(\d+)-", str(asked))[1]) for asked in (second, third)]  # type: ignore[index]
    assert 0 < starts[0] <= 2_000_000
    assert starts[0] < starts[1] <= starts[0] + 1_000_000


def test_a_cancelled_download_goes_on_later(server: Server) -> None:
    """The next run resumes a download that the user stopped."""
    control = Control()

    def stop(progress: object) -> None:
        if getattr(progress, "fraction", None):
            control.cancelled.set()

    control.report = stop
    with pytest.raises(CancelledError):
        download(server.url, SHA256, control)
    assert download(server.url, SHA256, Control()).read_bytes() == CONTENT
    assert server.asked[0] is None
    assert re.fullmatch(r"bytes=[1-9]\d*-", str(server.asked[1]))


def test_a_server_without_ranges_starts_again(server: Server) -> None:
    """The part that is there is not put before the whole."""
    server.has_ranges = False
    server.breaks_after = [2_000_000]
    assert download(server.url, SHA256, Control()).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_the_wrong_file_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    """The message has the hash that was found; nothing stays in the cache."""
    server.content = b"something else"
    with pytest.raises(SourceError, match=hashlib.sha256(server.content).hexdigest()):
        download(server.url, SHA256, Control())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_part_of_another_file_is_thrown_away(server: Server) -> None:
    """The server's file has changed since the first attempt: it is downloaded as a whole."""
    server.content = b"x" * len(CONTENT)
    server.breaks_after = [3_000_000]
    control = Control()

    def stop(progress: object) -> None:
        if getattr(progress, "fraction", None):
            control.cancelled.set()

    control.report = stop
    with contextlib.suppress(CancelledError):
        download(server.url, SHA256, control)
    server.content = CONTENT
    assert download(server.url, SHA256, Control()).read_bytes() == CONTENT
    assert server.asked[-1] is None


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/a", "file:///etc/passwd", "ftp://a/b"])
def test_only_https_is_followed(server: Server, target: str) -> None:
    """A redirection to anything else is refused."""
    server.redirect = target
    with pytest.raises(SourceError, match=r"which is not an https URL|is not allowed"):
        download(server.url, SHA256, Control())
    assert len(server.asked) == 1


def test_a_missing_file_is_not_tried_again(server: Server) -> None:
    """404 is final."""
    server.status = 404
    with pytest.raises(SourceError, match="404"):
        download(server.url, SHA256, Control())
    assert len(server.asked) == 1


def test_an_unknown_certificate_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has to be the one that it says it is."""
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SourceError, match="self-signed certificate"):
        download(server.url, SHA256, Control())
    assert not server.asked
