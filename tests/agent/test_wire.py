"""What clients see, on every interpreter: a real agent, real sockets, loopback only."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision.agent

from .agents import Response, parse_response, receive_all, take_response

if TYPE_CHECKING:
    from .agents import Agent
    from .interpreters import Interpreter

HEALTH = b"GET /health HTTP/1.1\r\nHost: guest\r\n\r\n"


def read_responses(sock: socket.socket, count: int) -> list[Response]:
    """Return that many responses from a connection that stays open."""
    responses: list[Response] = []
    data = b""
    while len(responses) < count:
        taken = take_response(data)
        if taken:
            responses.append(taken[0])
            data = taken[1]
        else:
            more = sock.recv(65536)
            assert more, f"closed after {len(responses)} of {count} responses: {data!r}"
            data += more
    assert data == b""
    return responses


def test_health_is_what_managers_expect(agent: Agent) -> None:
    """Health has exactly the three members of the contract, the time as an integer."""
    response = agent.get("/health")
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    answer = json.loads(response.body)
    assert set(answer) == {"status", "timestamp", "version"}
    assert answer["status"] == "healthy"
    assert answer["version"] == vmprovision.agent.__version__
    assert isinstance(answer["timestamp"], int)
    assert abs(answer["timestamp"] - time.time()) < 5


def test_metrics_have_the_types_of_the_contract(agent: Agent) -> None:
    """Integers are written as integers and floats as floats, in the raw text."""
    text = agent.get("/metrics").body.decode()
    for name in ("cpu_usage_percent", "memory_usage_percent", "load_average"):
        assert re.search(rf'"{name}":\d+\.\d+[,}}]', text), (name, text)
    for name in (
        "memory_used_kb",
        "memory_total_kb",
        "memory_available_kb",
        "uptime_seconds",
        "process_count",
    ):
        assert re.search(rf'"{name}":\d+[,}}]', text), (name, text)
    answer = json.loads(text)
    assert 0 <= answer["cpu_usage_percent"] <= 100
    assert 0 < answer["memory_usage_percent"] <= 100
    assert answer["memory_used_kb"] + answer["memory_available_kb"] == answer["memory_total_kb"]


def test_metrics_agree_with_the_kernel(agent: Agent) -> None:
    """Total memory, uptime and the number of processes are those of this machine."""
    answer = json.loads(agent.get("/metrics").body)
    meminfo = Path("/proc/meminfo").read_text()
    assert f"MemTotal: {answer['memory_total_kb']} kB" in re.sub(" +", " ", meminfo)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert abs(answer["uptime_seconds"] - uptime) < 3
    processes = sum(entry.name.isdigit() for entry in Path("/proc").iterdir())
    assert abs(answer["process_count"] - processes) <= max(5, processes // 4)


def test_metrics_move_while_it_sleeps(agent: Agent) -> None:
    """Two readings more than a second apart differ in uptime, and in between it hardly woke."""
    first = json.loads(agent.get("/metrics").body)["uptime_seconds"]
    time.sleep(0.1)
    before = voluntary_switches(agent)
    time.sleep(1.1)
    assert voluntary_switches(agent) - before <= 5
    second = json.loads(agent.get("/metrics").body)["uptime_seconds"]
    assert 1 <= second - first <= 4


def voluntary_switches(agent: Agent) -> int:
    """Return how often the agent has gone to sleep so far."""
    status = Path(f"/proc/{agent.run.pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_info_describes_the_guest(agent: Agent, interpreter: Interpreter) -> None:
    """Info names the interpreter, the kernel, process 1 and the agent's own process."""
    answer: dict[str, Any] = json.loads(agent.get("/info").body)
    kind = "MicroPython 1." if interpreter.is_micropython else "CPython "
    assert answer["runtime"].startswith(kind)
    assert answer["hostname"] == socket.gethostname()
    assert answer["kernel"] == Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert answer["vm_id"] is None
    assert answer["init"]["pid"] == agent.run.pid
    assert answer["init"]["pid1"] == Path("/proc/1/comm").read_text().strip()
    assert answer["init"]["parent"]["pid"] > 0
    assert answer["init"]["parent"]["comm"]
    assert not [address for address in answer["addresses"] if address.startswith("127.")]


def test_a_connection_serves_many_requests(agent: Agent) -> None:
    """A standard client gets several answers over one connection."""
    client = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=10)
    client.connect()
    first_socket = client.sock
    for path in ("/health", "/metrics", "/nowhere", "/info", "/health"):
        client.request("GET", path)
        response = client.getresponse()
        json.loads(response.read())
        assert response.status == (404 if path == "/nowhere" else 200)
        assert client.sock is first_socket
    client.close()


def test_pipelined_requests_are_answered_in_order(agent: Agent) -> None:
    """Requests sent in one piece, one with a body, get their answers in order."""
    requests = (
        HEALTH
        + b"GET /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /"
        + b"POST /health HTTP/1.1\r\nHost: a\r\n\r\n"
        + HEALTH
    )
    with agent.connect() as sock:
        sock.sendall(requests)
        statuses = [response.status for response in read_responses(sock, 4)]
    assert statuses == [200, 404, 405, 200]


def test_a_request_may_arrive_byte_by_byte(agent: Agent) -> None:
    """A request split into single bytes is one request."""
    with agent.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HEALTH:
            sock.sendall(bytes([byte]))
        assert read_responses(sock, 1)[0].status == 200


def test_a_client_that_reads_late_gets_everything(agent: Agent) -> None:
    """Hundreds of pipelined answers wait for a client that only sends at first."""
    count = 400
    with agent.connect() as sock:
        # Small enough for the answers to overflow the agent's side of the connection, too.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        sock.sendall(HEALTH * count)
        time.sleep(0.1)
        assert {response.status for response in read_responses(sock, count)} == {200}


def test_half_closed_clients_are_answered(agent: Agent) -> None:
    """A client that has said it will send no more still gets its answer."""
    with agent.connect() as sock:
        sock.sendall(HEALTH)
        sock.shutdown(socket.SHUT_WR)
        assert parse_response(receive_all(sock)).status == 200


def test_http_1_0_closes_unless_asked(agent: Agent) -> None:
    """HTTP/1.0 gets a closed connection, or one kept alive if it asks for that."""
    closed = parse_response(agent.exchange(b"GET /health HTTP/1.0\r\n\r\n"))
    assert closed.headers["connection"] == "close"
    with agent.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
        assert read_responses(sock, 1)[0].headers["connection"] == "keep-alive"
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert parse_response(receive_all(sock)).status == 200


def test_head_has_the_headers_of_get_and_no_body(agent: Agent) -> None:
    """HEAD announces the length of the body that GET sends."""
    data = agent.exchange(b"HEAD /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    taken = take_response(data, has_body=False)
    assert taken is not None
    assert taken[1] == b""
    assert int(taken[0].headers["content-length"]) == len(agent.get("/health").body)


CHUNKED = b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_REQUESTS = {
    "wrong method": (b"DELETE /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 405),
    "no such path": (b"POST /metric HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    "no version": (b"GET /health\r\n\r\n", 400),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "folded header": (b"GET /health HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400),
    "space before colon": (b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "zero byte": (b"GET /health HTTP/1.1\r\nHost: a\x00b\r\n\r\n", 400),
    "bad length": (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
    "two lengths": (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\n", 400),
    "huge body": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n", 413),
    "absurd body": (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
        413,
    ),
    "gzip": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "chunked twice": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked,chunked\r\n\r\n",
        501,
    ),
    "chunked in 1.0": (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "no chunk size": (CHUNKED + b"\r\n", 400),
    "signed chunk size": (CHUNKED + b"+1\r\na\r\n0\r\n\r\n", 400),
    "long chunk": (CHUNKED + b"2\r\nabc\r\n0\r\n\r\n", 400),
    "bare line feeds": (CHUNKED + b"1\na\n0\n\n", 400),
    "huge chunk": (CHUNKED + b"fffffff\r\n", 413),
    "endless chunk size": (CHUNKED + b"1" * 6000, 400),
    "endless trailers": (CHUNKED + b"0\r\n" + b"X: a\r\n" * 20000, 413),
    "two Hosts": (b"GET /health HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "Host with a space": (b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "Host with a path": (b"GET /health HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "Host with a user": (b"GET /health HTTP/1.0\r\nHost: a@b\r\n\r\n", 400),
    "Host with a wrong port": (b"GET /health HTTP/1.1\r\nHost: a:http\r\n\r\n", 400),
    "Host that is half an address": (b"GET /health HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"\1" * 160, 400),
    "large order": (
        b"POST /configure-interface HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n",
        413,
    ),
    "large order in chunks": (
        CHUNKED.replace(b"/health", b"/configure-interface")
        + b"1388\r\n"
        + b" " * 5000
        + b"\r\n0\r\n\r\n",
        413,
    ),
    "chunked and length": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        400,
    ),
    "expects": (
        b"POST / HTTP/1.1\r\nHost: a\r\nExpect: a miracle\r\nContent-Length: 3\r\n\r\n",
        417,
    ),
    "long line": (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "endless line": (b"GET /" + b"a" * 60000, 414),
    "long head": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: aaaaaaaaaaaa\r\n" * 600 + b"\r\n", 431),
    "endless head": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: aaaaaaaaaaaa\r\n" * 4000, 431),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_get_the_right_status(agent: Agent, name: str) -> None:
    """A request that cannot be served gets its status as JSON, and the connection closes."""
    request, status = BAD_REQUESTS[name]
    response = parse_response(agent.exchange(request))
    assert response.status == status
    assert response.headers["connection"] == "close"
    assert json.loads(response.body)["error"]
    if status == 405:
        assert response.headers["allow"] == "get, head"


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /health?x=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET http://guest:8080/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"\r\n\r\nGET /health HTTP/1.1\nHost: a\nConnection: close\n\n",
        b"GET /health HTTP/1.1\r\nhOST:a\r\nX:\r\nConnection: foo,  Close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /health HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /health HTTP/1.0\r\nExpect: a miracle\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: [fe80::1%25eth0]:8080\r\nConnection: close\r\n\r\n",
        CHUNKED.replace(b"Host", b"Connection: close\r\nHost") + b"0\r\n\r\n",
        CHUNKED.replace(b"chunked", b"Chunked\r\nConnection: close")
        + b'3;a="b"\r\nabc\r\nA \r\n0123456789\r\n000\r\nTrailer: a\r\n\r\n',
    ],
)
def test_unusual_but_valid_requests_are_served(agent: Agent, request_text: bytes) -> None:
    """Queries, absolute targets, bare line feeds, odd header case and bodies are understood."""
    assert parse_response(agent.exchange(request_text)).status == 200


def test_bodies_in_chunks_end_where_they_say(agent: Agent) -> None:
    """However they arrive, and however long they are, the next request follows at once."""
    body = b"400\r\n" + b"x" * 1024 + b"\r\n"
    whole = CHUNKED + body * 40 + b"0\r\nA: b\r\n\r\n"
    with agent.connect() as sock:
        sock.sendall(whole + HEALTH + CHUNKED + b"1\r\na\r\n0\r\n\r\n")
        assert [each.status for each in read_responses(sock, 3)] == [200, 200, 200]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in CHUNKED + b"3\r\nabc\r\n0\r\n\r\n":
            sock.sendall(bytes([byte]))
        assert read_responses(sock, 1)[0].status == 200
        sock.sendall(CHUNKED + body * 70)
        assert read_responses(sock, 1)[0].status == 413


def test_who_waits_for_a_word_gets_it(agent: Agent) -> None:
    """Expect: 100-continue is answered before the body, and not where the body is there."""
    head = b"GET /health HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\n"
    for more, body in (
        (b"Content-Length: 2", b"ab"),
        (b"Transfer-Encoding: chunked", b"0\r\n\r\n"),
    ):
        with agent.connect() as sock:
            sock.sendall(head + more + b"\r\n\r\n")
            received = b""
            while not received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
                received += sock.recv(1)
            sock.sendall(body + HEALTH)
            assert [each.status for each in read_responses(sock, 2)] == [200, 200]
            sock.sendall(head + more + b"\r\n\r\n" + body)
            assert read_responses(sock, 1)[0].status == 200
            sock.sendall(head + b"\r\n")
            assert read_responses(sock, 1)[0].status == 200


def test_answers_have_a_date(agent: Agent) -> None:
    """Good and bad ones have one in the form that the standard prefers."""
    for request in (HEALTH, b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n", b"x\r\n\r\n"):
        with agent.connect() as sock:
            sock.sendall(request)
            date = read_responses(sock, 1)[0].headers["date"]
        assert abs(parsedate_to_datetime(date).timestamp() - time.time()) < 5
        assert date.endswith(" gmt")


def test_slow_clients_hold_up_nobody(agent: Agent) -> None:
    """While clients dawdle in the middle of their requests, others are served at once."""
    dawdlers = [agent.connect() for _ in range(10)]
    try:
        for sock in dawdlers:
            sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        started = time.monotonic()
        assert agent.get("/health").status == 200
        assert time.monotonic() - started < 1
        dawdlers[0].sendall(b"st: a\r\n\r\n")
        assert read_responses(dawdlers[0], 1)[0].status == 200
    finally:
        for sock in dawdlers:
            sock.close()


def test_more_connections_than_it_keeps(agent: Agent) -> None:
    """Two hundred idle connections never keep a new client out; the oldest ones make room."""
    idle = []
    try:
        for number in range(200):
            idle.append(agent.connect())
            if number % 50 == 49:
                assert agent.get("/health").status == 200
        idle[0].settimeout(5)
        assert idle[0].recv(1) == b""
    finally:
        for sock in idle:
            sock.close()


def test_garbage_never_stops_it(agent: Agent) -> None:
    """After thousands of seeded malformed requests it serves as before, and logged no failure."""
    rng = random.Random(20)
    pieces = [
        *(b"GET", b"POST", b"HEAD", b" ", b" ", b"/", b"/health", b"HTTP/1.1", b"HTTP/1.0"),
        *(b"\r\n", b"\r\n", b"\n", b"\r", b"Host: a", b"Host:", b"Content-Length: ", b"7"),
        *(b"Transfer-Encoding: chunked", b":", b",", b"\x00", b"\xff\xfe", b"%00", b"\t"),
        *(b"Connection: keep-alive", b"Connection: close", b"A" * 300, b"GET /health HTTP/1.1"),
    ]
    for _ in range(150):
        with agent.connect() as sock:
            sock.settimeout(5)
            try:
                for _ in range(20):
                    sock.sendall(b"".join(rng.choices(pieces, k=rng.randint(1, 12))))
                sock.shutdown(socket.SHUT_WR)
                if rng.random() < 0.5:
                    receive_all(sock)
            except (BrokenPipeError, ConnectionResetError, OSError):
                pass
    assert agent.get("/health").status == 200
    assert agent.run.poll() is None
    assert "while serving" not in agent.log_text()
    assert "in the loop" not in agent.log_text()


def test_a_thousand_requests_leave_no_memory_behind(agent: Agent, interpreter: Interpreter) -> None:
    """Memory in use grows by less than a megabyte over a thousand requests."""
    before = resident_kilobytes(agent)
    client = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=10)
    for number in range(1000):
        client.request("GET", "/metrics" if number % 2 else "/health")
        client.getresponse().read()
    client.close()
    after = resident_kilobytes(agent)
    assert after - before < 1024
    assert after < (5 if interpreter.is_micropython else 16) * 1024


def resident_kilobytes(agent: Agent) -> int:
    """Return the memory that the agent's process holds."""
    status = Path(f"/proc/{agent.run.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
