"""Runs real agents for the tests and talks to them over loopback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import vmprovision.agent
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .interpreters import Interpreter

SOURCE = Path(vmprovision.agent.__file__).parent
START_SECONDS = 20.0


def build_program(folder: Path) -> Path:
    """Return the agent's file, as it is put into guests."""
    path = folder / "guest-agent"
    path.write_bytes(build_archive().content)
    return path


def free_port() -> int:
    """Return a TCP port on which nothing listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A running agent."""

    port: int
    log: Path
    run: subprocess.Popen[bytes]
    started: float

    def connect(self) -> socket.socket:
        """Return a connection to it; every operation on it has a time limit."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def get(self, path: str, *, accept: str = "*/*", patience: float = 0.0) -> Response:
        """Return what it answers to one GET.

        Args:
            path: the path.
            accept: the media types.
            patience: for how many seconds to ask again while it has no room for a client.
        """
        lines = [f"GET {path} HTTP/1.1", "Host: guest", "Connection: close", f"Accept: {accept}"]
        request = "\r\n".join([*lines, "", ""]).encode()
        deadline = time.monotonic() + patience
        while not (answer := self.exchange(request)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return parse_response(answer)

    def exchange(self, request: bytes) -> bytes:
        """Send bytes on a new connection and return what arrives until the agent closes it."""
        with self.connect() as sock:
            sock.sendall(request)
            return receive_all(sock)

    def log_text(self) -> str:
        """Return what it has logged."""
        return self.log.read_text()

    def await_log(self, pattern: str, seconds: float = 15.0) -> str:
        """Wait until the log contains the pattern, and return the log."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.log_text()):
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.log_text()}"
            time.sleep(0.05)
        return self.log_text()


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def receive_all(sock: socket.socket) -> bytes:
    """Return what arrives until the peer closes or resets the connection."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def take_response(data: bytes, *, has_body: bool = True) -> tuple[Response, bytes] | None:
    """Return the first complete response in the data and what follows it."""
    head, separator, rest = data.partition(b"\r\n\r\n")
    if not separator:
        return None
    status_line, *lines = head.decode("ascii").split("\r\n")
    assert re.fullmatch(r"HTTP/1\.1 \d{3} [A-Z].*", status_line), status_line
    headers = dict(line.lower().split(": ", 1) for line in lines)
    if headers.get("transfer-encoding") == "chunked" and has_body:
        chunks = take_chunks(rest)
        if chunks is None:
            return None
        body, rest = chunks
        return Response(status=int(status_line.split()[1]), headers=headers, body=body), rest
    length = int(headers["content-length"]) if has_body else 0
    if len(rest) < length:
        return None
    status = int(status_line.split()[1])
    return Response(status=status, headers=headers, body=rest[:length]), rest[length:]


def take_chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """Return a body in chunks (RFC 9112, section 7.1), once it has ended, and what follows it."""
    body = b""
    while True:
        size, separator, rest = data.partition(b"\r\n")
        length = int(size, 16) if separator else 0
        if not separator or len(rest) < length + 2:
            return None
        assert rest[length : length + 2] == b"\r\n"
        body += rest[:length]
        data = rest[length + 2 :]
        if not length:
            return body, data


def parse_response(data: bytes) -> Response:
    """Return the one response that is all of the data."""
    taken = take_response(data)
    assert taken is not None, data[-300:]
    assert taken[1] == b"", data[-300:]
    return taken[0]


@contextmanager
def running_agent(  # noqa: PLR0913 -- everything but the first three has a default
    interpreter: Interpreter,
    program: Path,
    folder: Path,
    *,
    config: str = "",
    listen: str | None = "127.0.0.1",
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Agent]:
    """Yield an agent that already answers; end it by its process number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agent.conf").write_text(config)
    port = free_port()
    log = folder / "stderr"
    argv = [*interpreter.argv, str(program), "--port", str(port)]
    argv += ["--listen", listen] if listen else []
    argv += ["--config", str(folder / "agent.conf"), *arguments]
    with log.open("wb") as stderr:
        run = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
            cwd=folder,
        )
    agent = Agent(port=port, log=log, run=run, started=time.monotonic())
    try:
        await_answer(agent)
        yield agent
    finally:
        stop(run)


def await_answer(agent: Agent) -> None:
    """Wait until the agent accepts connections."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert agent.run.poll() is None, agent.log_text()
        try:
            agent.connect().close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, agent.log_text()
            time.sleep(0.02)
        else:
            return


def stop(run: subprocess.Popen[bytes]) -> None:
    """End a process, by force if it takes more than three seconds."""
    if run.poll() is None:
        run.terminate()
    try:
        run.wait(3)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One request that a manager received, and when."""

    moment: float
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True, kw_only=True)
class Manager:
    """A real HTTP server that answers reports with the statuses given, the last one for ever."""

    statuses: list[int]
    reports: list[Report] = field(default_factory=list)
    port: int = 0

    def await_reports(self, count: int, seconds: float = 20.0) -> list[Report]:
        """Return the reports, once there are that many."""
        deadline = time.monotonic() + seconds
        while len(self.reports) < count:
            assert time.monotonic() < deadline, self.reports
            time.sleep(0.05)
        return list(self.reports)


@contextmanager
def running_manager(*statuses: int) -> Iterator[Manager]:
    """Yield a manager on loopback."""
    manager = Manager(statuses=list(statuses))

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            manager.reports.append(
                Report(
                    moment=time.monotonic(),
                    method=self.command,
                    path=self.path,
                    headers=dict(self.headers.items()),
                    body=self.rfile.read(length),
                )
            )
            last = len(manager.statuses) == 1
            self.send_response(manager.statuses[0] if last else manager.statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test output quiet."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        manager.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield manager
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def black_hole() -> Iterator[int]:
    """Return a loopback port that swallows connection attempts: its queue stays full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                filler.settimeout(0)
                filler.connect_ex(listener.getsockname())
                fillers.append(filler)
            yield listener.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()
