"""Hostile clients by the hundred thousand: seeded, bounded, over loopback and Unix sockets only.

``nox -s fuzz`` sends 100,000 malformed requests to an agent of each family of interpreters;
``test_fuzz`` sends some thousand.  A run is repeated by its seed.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .agents import build_program, receive_all, running_agent
from .interpreters import MICROPYTHON, find_cpythons, get_interpreter

if TYPE_CHECKING:
    from collections.abc import Callable

    from .agents import Agent

REQUESTS = 100_000
SEED = 4
AT_ONCE = 8
DAWDLERS = 6  # with those at once still within what the runtime keeps
CROWD = 200
LAST_CROWD = 2000
CROWD_SECONDS = 5.0
LOOK_EVERY = 2000  # requests, between two looks at the agent
ANSWER_SECONDS = 2.0  # after which the manager gives up
GROWTH_KILOBYTES = 1024
# 500 would be an error of ours.
ALLOWED = {200, 400, 401, 403, 404, 405, 413, 414, 417, 431, 501, 503, 505}
HEALTH = b"GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n"
CONFIG = "TOKEN=t0k3n\nALLOW_CONFIGURE=yes\n"

METHODS = (b"GET", b"POST", b"PUT", b"get", b"", b"G\x00T", b"OPTIONS", b"CONNECT", b"PRI")
TARGETS = (
    *(b"/", b"/health", b"/metrics", b"/info", b"/configure-interface", b"*", b"", b"//", b"/%00"),
    *(b"http://guest/metrics", b"http://", b"/../etc/passwd", b"/" + b"a" * 4090, b"/\xff", b"?"),
)
VERSIONS = (
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"HTTP/2.0",
    b"HTTP/1.",
    b"HTTP/99",
    b"http/1.1",
    b"",
    b"\x00",
)
NAMES = (
    *(b"Host", b"Accept", b"Connection", b"Content-Length", b"Transfer-Encoding", b"Expect"),
    *(b"Authorization", b"X", b"", b" ", b"Host ", b"\x00", b"X" * 300, b"\xc3\xa4", b"Upgrade"),
)
VALUES = (
    *(b"guest", b"*/*", b"text/plain", b"text/plain;q=0.5,*/*;q=0.1", b"close", b"keep-alive"),
    *(b"0", b"5", b"-1", b"65536", b"9" * 30, b"5, 5", b"5, 6", b"chunked", b"100-continue"),
    *(b"Bearer t0k3n", b"Bearer x", b"", b",;,;q=q=;,", b"a,b" * 200, b"\x7f", b"\x00", b" \t "),
    *(b"text/plain;" + b"q=1;" * 100, b"\xff\xfe", b"h2c", b"gzip;q=0", b"*/*;q=9e999"),
)
ENDS = (b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n", b"")
BODIES = (
    *(b"", b"{}", b'{"interface":"none"}', b'{"interface":' + b"[" * 2000, b'{"a":1', b"\x00" * 50),
    *(
        b"0\r\n\r\n",
        b"5\r\nabcde\r\n0\r\n\r\n",
        b'"' + b"\\u0000" * 300,
        b"GET /health HTTP/1.1\r\n\r\n",
    ),
)


def compose(rng: random.Random) -> bytes:
    """Return a request made of valid and invalid parts."""
    out = [rng.choice(METHODS), b" ", rng.choice(TARGETS), b" ", rng.choice(VERSIONS)]
    for _ in range(rng.randrange(6)):
        out += [rng.choice(ENDS), rng.choice(NAMES), rng.choice((b":", b": ", b"", b" : "))]
        out.append(rng.choice(VALUES))
    return b"".join([*out, rng.choice(ENDS), rng.choice(ENDS), rng.choice(BODIES)])


def mutate(rng: random.Random) -> bytes:
    """Return a valid request with bytes changed, removed, doubled, or cut off."""
    lines = (b"POST /configure-interface HTTP/1.1", b"GET /metrics HTTP/1.1", b"GET /info HTTP/1.0")
    head = [rng.choice(lines), b"Host: guest", b"Accept: text/plain;version=0.0.4;q=0.5,*/*;q=0.1"]
    head += [b"Content-Length: 2", b"Authorization: Bearer wrong"]
    data = bytearray(b"\r\n".join([*head, b"", b"{}"]))
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 40)] * rng.randint(1, 4)
        elif kind == 3:
            data[at:at] = rng.choice((b"\r\n", b"\n", b"\x00", b":", b" ", b"\r", b"\xff"))
        else:
            del data[at:]
    return bytes(data)


def noise(rng: random.Random) -> bytes:
    """Return random bytes, or lines of them."""
    return rng.randbytes(rng.randint(1, 600)) + rng.choice((b"", b"\r\n\r\n", b"\n\n"))


def bomb(rng: random.Random) -> bytes:
    """Return too much of something: of header fields, of a line, of a body, of empty lines."""
    start = b"GET /health HTTP/1.1\r\nHost: a\r\n"
    return rng.choice(
        (
            start + b"X: y\r\n" * rng.randint(1000, 3000) + b"\r\n",
            start + b"X: " + b"y" * rng.randint(7000, 20000) + b"\r\n\r\n",
            b"GET /" + b"%41" * rng.randint(1300, 5000) + b" HTTP/1.1\r\n\r\n",
            b"\r\n" * rng.randint(1, 6000) + start,
            start + b"Content-Length: 65536\r\n\r\n" + b"z" * rng.randint(0, 30000),
            start + b"Accept: " + b"," * 7000 + b"\r\n\r\n",
            b"A" * rng.randint(4000, 30000),
        )
    )


def pipeline(rng: random.Random) -> bytes:
    """Return many requests in one piece, with garbage among them."""
    good = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n"
    parts = [rng.choice((good, good, compose(rng), mutate(rng))) for _ in range(rng.randint(2, 12))]
    return b"".join(parts)


KINDS: tuple[tuple[Callable[[random.Random], bytes], int], ...] = (
    (compose, 40),
    (mutate, 40),
    (noise, 10),
    (bomb, 5),
    (pipeline, 5),
)


@dataclass(slots=True, kw_only=True)
class Campaign:
    """An attack on one agent, and what came of it.

    Attributes:
        agent: it listens on the Unix socket, too.
        path: of that socket.
        rng: decides everything.
        statuses: how often each was answered.
        silent: connections that were closed without an answer.

    """

    agent: Agent
    path: Path
    rng: random.Random
    statuses: Counter[int] = field(default_factory=Counter)
    silent: int = 0
    dawdlers: deque[socket.socket] = field(default_factory=deque)

    def run(self, count: int) -> None:
        """Send so many requests; fails where the agent does what it must not."""
        memory = 0
        for sent in range(0, count, AT_ONCE):
            self._send_some()
            if sent % LOOK_EVERY < AT_ONCE or sent + AT_ONCE >= count:
                self._look()
                self._crowd(CROWD)
                if sent <= count // 10:  # what it needs, it has needed by now
                    memory = self.resident()
        self._crowd(LAST_CROWD)
        self._look()
        grown = self.resident() - memory
        assert grown < GROWTH_KILOBYTES, f"it grew by {grown} KB"
        for sock in self.dawdlers:
            sock.close()

    def resident(self) -> int:
        """Return the memory of the agent in kilobytes."""
        status = Path(f"/proc/{self.agent.run.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def _send_some(self) -> None:
        """Send a request on each of some connections at the same time."""
        weights = [weight for _, weight in KINDS]
        waiting = []
        for make, _ in self.rng.choices(KINDS, weights, k=AT_ONCE):
            sock = self._connect()
            with suppress(BrokenPipeError, ConnectionResetError):  # it has seen enough
                sock.sendall(make(self.rng))
                if self.rng.randrange(200):
                    sock.shutdown(socket.SHUT_WR)
                    waiting.append(sock)
                    continue
            self._leave_open(sock)
        for sock in waiting:
            if self.rng.randrange(20):
                self._take_answers(receive_all(sock))
            sock.close()

    def _connect(self) -> socket.socket:
        """Return a connection, sometimes over TCP."""
        if self.rng.randrange(20) == 0:
            return self.agent.connect()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))  # with a time limit it would not wait for a place in the queue
        sock.settimeout(10)
        return sock

    def _leave_open(self, sock: socket.socket) -> None:
        """Open a client that never finishes; close an earlier one."""
        self.dawdlers.append(sock)
        if len(self.dawdlers) > DAWDLERS:
            self.dawdlers.popleft().close()

    def _take_answers(self, data: bytes) -> None:
        found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", data)]
        assert data.startswith(b"HTTP/1.1 ") or not data, data[:200]
        assert set(found) <= ALLOWED, data[:2000]
        self.statuses.update(found)
        self.silent += not data

    def _crowd(self, size: int) -> None:
        """Check that many unfinished requests keep nobody out for long."""
        crowd = [self.agent.connect() for _ in range(size)]
        for sock in crowd:
            with suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        deadline = time.monotonic() + CROWD_SECONDS
        while b"healthy" not in self.agent.exchange(HEALTH):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for sock in crowd:
            sock.close()

    def _look(self) -> None:
        """Check that the agent still answers in a manager's time limit and has logged no fault."""
        started = time.monotonic()
        response = self.agent.get("/health")
        assert response.status == 200
        assert time.monotonic() - started < ANSWER_SECONDS
        assert self.agent.run.poll() is None
        log = self.agent.log_text()
        for text in ("while serving", "in the loop", "Traceback", "internal error", "reporting:"):
            assert text not in log, log[-2000:]


def attack(name: str, program: Path, folder: Path, count: int, seed: int) -> Campaign:
    """Attack an agent on the interpreter of that name."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    path = folder / "agent.sock"
    listen = f"unix:{path},127.0.0.1"
    with running_agent(
        get_interpreter(name), program, folder, config=CONFIG, listen=listen
    ) as agent:
        campaign = Campaign(agent=agent, path=path, rng=random.Random(f"{seed} {name}"))
        campaign.run(count)
        agent.run.terminate()
        assert agent.run.wait(5) == 0
    return campaign


def families() -> list[str]:
    """Return an interpreter of each family: CPython 2, CPython 3, the runtime."""
    pythons = list(find_cpythons())
    second = [name for name in pythons if name.startswith(("cpython-2.", "python2"))][:1]
    third = [name for name in pythons if name not in second and "-2." not in name][-1:]
    return [*second, *third, MICROPYTHON]


def main() -> None:
    """Attack an agent of each family and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="to each of them")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("interpreters", nargs="*", default=families(), help="one of each family")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build_program(folder)
        for interpreter in options.interpreters:
            started = time.monotonic()
            done = attack(
                interpreter, program, folder / interpreter, options.requests, options.seed
            )
            answers = ", ".join(f"{done.statuses[key]} x {key}" for key in sorted(done.statuses))
            sys.stdout.write(
                f"{interpreter}: {options.requests} requests in {time.monotonic() - started:.0f} s;"
                f" answered {answers}; {done.silent} closed without an answer; serves as before\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
