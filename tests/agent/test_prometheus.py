"""`GET /metrics` for Prometheus: by Debian's own Prometheus, promtool and node_exporter."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

import vmprovision.agent
from tests.debian import unpacked
from vmprovision.agent import http

from .agents import Agent, free_port, running_agent, stop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .interpreters import Interpreter

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROTOBUF = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily"
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})? ([-+.0-9eE]+)")
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
START_SECONDS = 30.0
ROOM_SECONDS = 60.0

Key = tuple[str, frozenset[tuple[str, str]]]
Samples = dict[Key, float]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("application/json, text/plain, */*", "json"),
        (FIREFOX, "json"),
        ("text/html", "json"),
        (PROMETHEUS_2, "text"),
        (PROMETHEUS_3, "text"),
        ("text/plain", "text"),
        ("TEXT/*;Q=0.1", "text"),
        ('text/plain;version="0.0.4"', "text"),
        ("text/plain;version=1.0.0,*/*;q=0.1", "text"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8;q=0.2,*/*;q=0.1", "text"),
        ("text/plain;version=0.0.4;escaping=underscores;q=0.2,application/json;q=0.1", "text"),
        ("application/openmetrics-text;version=1.0.0;escaping=values;q=0.2,*/*;q=0.1", "text"),
        ("application/openmetrics-text; version=1.0.0, application/openmetrics-text", "text"),
        (PROTOBUF + ";encoding=delimited;escaping=allow-utf-8;q=0.2,*/*;q=0.1", "text"),
        ("application/vnd.google.protobuf,*/*;q=0.1", "json"),
        ("application/openmetrics-text;q=0,*/*", "json"),
        ("application/openmetrics-text,application/json;q=0.1", "json"),
        ("text/plain;version=9", "text"),
        ("application/json;q=0.5,text/plain;q=0.6", "text"),
        ("application/json;q=0.6,text/plain;q=0.5", "json"),
        ("text/plain;q=0", "json"),
        ("text/*;q=0.9,text/plain;q=0,application/json;q=0.1", "json"),
        ("text/plain;q=0.001", "text"),
        ("text/plain;q=-1", "json"),
        ("text/plain;q=1.001,application/json;q=0.999", "text"),
        (",;,text/plain;;q=1 ,", "text"),
        ("x/y," * 40 + "text/plain", "json"),
    ],
)
def test_the_kind_that_is_liked_best(accept: str | None, expected: str) -> None:
    """The most specific range decides on each kind, the higher quality between them, else JSON."""
    values = [] if accept is None else [accept.encode()]
    assert ("text" if http.likes_exposition(values) else "json") == expected


@pytest.fixture(scope="module")
def prometheus() -> Path:
    """Return the folder with Debian's Prometheus and promtool."""
    return unpacked("prometheus") / "usr/bin"


@contextmanager
def running(argv: list[str | Path], folder: Path, port: int) -> Iterator[None]:
    """Yield the port of a server that answers; end it by its process number."""
    with (folder / f"log-{port}").open("wb") as log:
        run = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env={}
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                fetch(port, "/-/ready" if "prometheus" in str(argv[0]) else "/")
                break
            except OSError:
                assert run.poll() is None, (folder / f"log-{port}").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield
    finally:
        stop(run)


def fetch(port: int, path: str) -> bytes:
    """Return the body of an answer from loopback."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        content: bytes = answer.read()
    return content


def exposition(agent: Agent, *, patience: float = 0.0) -> str:
    """Return what the agent tells Prometheus."""
    response = agent.get("/metrics", accept=PROMETHEUS_2, patience=patience)
    assert response.status == 200
    assert response.headers["content-type"] == http.EXPOSITION
    return response.body.decode()


def parse_types(text: str) -> dict[str, str]:
    """Return the type of each metric."""
    return dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text))


def parse_samples(text: str) -> Samples:
    """Return the value of each sample by its name and labels; no two may be the same."""
    found: Samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            key = match[1], frozenset(LABEL.findall(match[2] or ""))
            assert key not in found, line
            found[key] = float(match[3])
    return found


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_the_exposition_is_well_formed(agent: Agent, version: str) -> None:
    """Every metric has help and a type, and its samples follow these."""
    head = f"GET /metrics HTTP/{version}\r\nHost: a\r\nConnection: close\r\nAccept: text/plain\r\n"
    raw = agent.exchange(head.encode() + b"\r\n")
    if version == "1.0":
        assert b"Transfer-Encoding" not in raw
        text = raw.partition(b"\r\n\r\n")[2].decode()
    else:
        text = exposition(agent)
    assert text.endswith("\n")
    current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split()[2]
        elif line.startswith("# TYPE "):
            assert line.split()[2] == current
        else:
            assert re.split(r"[{ ]", line)[0] == current
    assert len(parse_samples(text)) > 100


def test_a_connection_goes_on_after_an_exposition(agent: Agent) -> None:
    """JSON, exposition, HEAD and exposition again, pipelined on one connection."""
    asks = [("GET", "*/*"), ("GET", "text/plain"), ("HEAD", "text/plain"), ("GET", "text/plain")]
    lines = [
        f"{method} /metrics HTTP/1.1\r\nHost: a\r\nAccept: {kind}\r\n" for method, kind in asks
    ]
    lines[-1] += "Connection: close\r\n"
    answers = agent.exchange("".join(f"{line}\r\n" for line in lines).encode())
    kinds = re.findall(rb"\r\nContent-Type: ([a-z/]+)", answers)
    assert kinds == [b"application/json", b"text/plain", b"text/plain", b"text/plain"]
    assert answers.count(b"# TYPE node_load1 gauge\n") == 2
    assert answers.endswith(b"\r\n0\r\n\r\n")


def test_pieces_do_not_wait_for_each_other(agent: Agent) -> None:
    """Ten scrapes on one connection take no pauses of Nagle's algorithm, 40 ms each."""
    ask = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n"
    quickest = 1.0
    with agent.connect() as sock, sock.makefile("rb") as answers:
        for _ in range(10):
            started = time.monotonic()
            sock.sendall(ask)
            while answers.readline() != b"0\r\n":
                pass
            answers.readline()
            quickest = min(quickest, time.monotonic() - started)
    assert quickest < 0.035


def criticise(prometheus: Path, text: str) -> set[str]:
    """Return the output of `promtool check metrics` for an exposition."""
    argv: list[str | Path] = [prometheus / "promtool", "check", "metrics"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert "error" not in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (3 if done.stderr else 0, "")
    return set(done.stderr.splitlines())


def test_promtool_criticises_nothing_of_ours(agent: Agent, prometheus: Path, exporter: int) -> None:
    """`promtool check metrics` dislikes only the kernel's names in node_exporter's own."""
    found = criticise(prometheus, exposition(agent))
    assert {line for line in found if not line.startswith("node_memory_")} == set()
    assert found <= criticise(prometheus, fetch(exporter, "/metrics").decode())


def test_prometheus_scrapes_it_unconfigured(
    interpreter: Interpreter, program: Path, tmp_path: Path, prometheus: Path
) -> None:
    """A Prometheus that knows no more than the address has the target up, and its figures."""
    with running_agent(interpreter, program, tmp_path, config="VM_ID=web-1\n") as agent:
        (tmp_path / "prometheus.yml").write_text(
            "scrape_configs:\n- job_name: guests\n  scrape_interval: 1s\n  static_configs:\n"
            f"  - targets: ['127.0.0.1:{agent.port}']\n"
        )
        port = free_port()
        argv: list[str | Path] = [prometheus / "prometheus", "--config.file=prometheus.yml"]
        argv += ["--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
        with running(argv, tmp_path, port):
            deadline = time.monotonic() + START_SECONDS
            while not query(port, "up == 1"):
                assert time.monotonic() < deadline, fetch(port, "/api/v1/targets").decode()
                time.sleep(0.2)
            (target,) = json.loads(fetch(port, "/api/v1/targets"))["data"]["activeTargets"]
            machine = query(port, "guest_agent_machine_info")
            memory = query(port, "node_memory_MemTotal_bytes")
            modes = query(port, 'count by (mode) (node_cpu_seconds_total{cpu="0"})')
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["scrapeUrl"] == f"http://127.0.0.1:{agent.port}/metrics"
    assert machine[0]["metric"]["vm_id"] == "web-1"
    assert float(memory[0]["value"][1]) > 0
    assert len(modes) == 8


def query(port: int, expression: str) -> list[dict[str, Any]]:
    """Return what Prometheus answers to a query."""
    answer = json.loads(fetch(port, f"/api/v1/query?query={quote(expression)}"))
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Return the port of Debian's node_exporter."""
    program = unpacked("prometheus-node-exporter") / "usr/bin/prometheus-node-exporter"
    port = free_port()
    argv: list[str | Path] = [program, f"--web.listen-address=127.0.0.1:{port}"]
    with running(argv, tmp_path_factory.mktemp("exporter"), port):
        yield port


def test_figures_are_those_of_node_exporter(agent: Agent, exporter: int) -> None:
    """Names, types, labels and values are its own: what is read before and after surrounds it."""
    wrong: dict[Key, tuple[float, float, float]] = {}
    for _ in range(5):  # what goes up and down does not always do so in time
        first = parse_samples(exposition(agent))
        text = fetch(exporter, "/metrics").decode()
        last = exposition(agent)
        types, theirs = parse_types(last), parse_types(text)
        ours = {name: kind for name, kind in types.items() if name.startswith("node_")}
        assert {name: theirs.get(name) for name in ours} == ours
        samples, after = parse_samples(text), parse_samples(last)
        common = {key for key in after if key in samples}
        # Each process sees mounts of its own, and this node_exporter passes the loopback over.
        # Nor does it pass over compressed RAM disks, as its later versions do.
        theirs_only = {key for key in samples if key[0] in ours} - common
        theirs_only -= {key for key in theirs_only if "zram" in dict(key[1]).get("device", "")}
        assert {name for name, _ in theirs_only if not name.startswith("node_filesystem_")} == set()
        assert {name for name, _ in common} == set(ours)
        assert ("node_filesystem_size_bytes", "/") in {
            (name, dict(labels).get("mountpoint")) for name, labels in common
        }
        surrounding = {
            key: (first.get(key, after[key]), samples[key], after[key]) for key in common
        }
        wrong = {
            key: three
            for key, three in surrounding.items()
            if not is_between(types[key[0]], *three)
        }
        assert [key for key in wrong if types[key[0]] == "counter"] == []
        if not wrong:
            break
    assert wrong == {}


def is_between(kind: str, before: float, value: float, after: float) -> bool:
    """Return whether a value fits between two others, loosely where it goes up and down."""
    room = 1e-9 * abs(value) if kind == "counter" else 0.05 * abs(value) + 5
    return min(before, after) - room <= value <= max(before, after) + room


def test_the_essential_metrics_are_there(agent: Agent) -> None:
    """The metrics that node_exporter's dashboards and alerts use."""
    names = {name for name, _ in parse_samples(exposition(agent))}
    assert names >= {
        *(f"node_cpu_{name}" for name in ("seconds_total", "guest_seconds_total")),
        *(f"node_memory_{name}_bytes" for name in ("MemTotal", "MemFree", "Buffers", "Cached")),
        *("node_load1", "node_load5", "node_load15", "node_time_seconds"),
        *("node_boot_time_seconds", "node_uname_info", "node_os_info"),
        *("node_procs_running", "node_procs_blocked", "node_forks_total"),
        *("node_context_switches_total", "node_intr_total", "node_filefd_allocated"),
        *("node_network_receive_bytes_total", "node_network_transmit_bytes_total"),
        *("node_network_up", "node_vmstat_pgfault", "node_sockstat_TCP_inuse"),
        "guest_agent_build_info",
    }


def test_build_info_names_version_and_runtime(agent: Agent, interpreter: Interpreter) -> None:
    """The agent's own metric says what it is and what it runs on."""
    samples = parse_samples(exposition(agent))
    (labels,) = [dict(labels) for name, labels in samples if name == "guest_agent_build_info"]
    assert labels["version"] == vmprovision.agent.__version__
    assert labels["runtime"].startswith("MicroPython" if interpreter.is_micropython else "CPython")


def test_a_reader_that_stops_is_let_go(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Scrapes that are never read end with their time, and leave neither files nor memory held."""
    with running_agent(interpreter, program, tmp_path) as agent:
        ask = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n"
        for _ in range(40):
            with agent.connect() as sock:
                sock.sendall(ask * 20)
        # while all that it serves are new, it has no room for one more
        text = exposition(agent, patience=ROOM_SECONDS)
        assert len(parse_samples(text)) > 100
        assert agent.get("/health", patience=ROOM_SECONDS).status == 200
        assert "while serving" not in agent.log_text()
