"""Measure the agent beside Debian's node_exporter, and write the table in docs/agent.md.

Everything runs on loopback, in turn, in several rounds; the table has medians.  Processor
time is the kernel's count for the process, because other load on the machine disturbs it
less than it disturbs wall time.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tests.agent.agents import build_program, free_port, stop
from tests.agent.interpreters import MICROPYTHON, find_cpythons, get_interpreter
from tests.debian import unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import BinaryIO

DOCUMENT = Path(__file__).parents[2] / "docs/agent.md"
BEGIN, END = "<!-- bench: agent -->", "<!-- /bench: agent -->"
ACCEPTS = {"json": "application/json", "text": "text/plain;version=0.0.4"}
START_SECONDS = 20.0
BATCH = 100

AGENT, RUNTIME, EXPORTER = "guest-agent", "the runtime", "node_exporter"


@dataclass(slots=True, kw_only=True)
class Subject:
    """A server that is measured.

    Attributes:
        name: its column in the table.
        argv: the program; `{port}` is replaced by the port that it listens on.
        files: what it takes on disk, without a guest's own interpreter.
        kinds: the formats of its metrics.
        figures: the measurements, by name.
    """

    name: str
    argv: Sequence[str]
    files: Sequence[Path]
    kinds: Sequence[str] = ("json", "text")
    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, value: float) -> None:
        """Keep one measurement."""
        self.figures.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> float:
        """Return the median of a measurement."""
        return median(self.figures[name])

    @property
    def size(self) -> int:
        """Return its size on disk, in bytes."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that has answered."""

    pid: int
    port: int
    first_answer: float

    def resident(self) -> float:
        """Return its resident memory, in megabytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def processor_seconds(self) -> float:
        """Return the processor time of all its threads, by the scheduler's nanoseconds."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def find_subjects(folder: Path) -> list[Subject]:
    """Return the agent on the runtime and on this host's Pythons, and node_exporter."""
    program = build_program(folder)
    (folder / "conf").touch()
    options = [str(program), "--listen", "127.0.0.1", "--port", "{port}"]
    options += ["--config", str(folder / "conf")]
    runtime = get_interpreter(MICROPYTHON).argv
    found = [Subject(name=RUNTIME, argv=[*runtime, *options], files=[Path(runtime[0]), program])]
    pythons = find_cpythons()
    for name in ("python3", *(name for name in pythons if name.startswith("cpython-2.7"))):
        if name in pythons:
            argv = [*pythons[name].argv, *options]
            version = python_version(pythons[name].argv[0])
            found.append(Subject(name=f"CPython {version}", argv=argv, files=[program]))
    exporter = unpacked("prometheus-node-exporter") / "usr/bin/prometheus-node-exporter"
    argv = [str(exporter), "--web.listen-address=127.0.0.1:{port}"]
    return [*found, Subject(name=EXPORTER, argv=argv, files=[exporter], kinds=("text",))]


def python_version(program: str) -> str:
    """Return the version of a Python."""
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    done = subprocess.run([program, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def running(subject: Subject) -> Iterator[Running]:
    """Run the server, and end it afterwards."""
    port = free_port()
    argv = [word.replace("{port}", str(port)) for word in subject.argv]
    started = time.perf_counter()
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={}
    ) as run:
        try:
            while not answers(port):
                assert run.poll() is None, f"{subject.name} has ended"
                assert time.perf_counter() - started < START_SECONDS, f"{subject.name} is mute"
                time.sleep(0.0005)
            yield Running(pid=run.pid, port=port, first_answer=time.perf_counter() - started)
        finally:
            stop(run)


def answers(port: int) -> bool:
    """Return whether something answers on the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return sock.recv(16).startswith(b"HTTP/1.")
    except ConnectionError:
        return False


def ask(port: int, kind: str, count: int, at_once: int = 1) -> None:
    """Ask for the metrics a number of times on one connection, some of them pipelined."""
    head = f"GET /metrics HTTP/1.1\r\nHost: guest\r\nAccept: {ACCEPTS[kind]}\r\n\r\n"
    requests = head.encode() * at_once
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock.makefile("rb") as answers:
            for _ in range(count // at_once):
                sock.sendall(requests)
                for _ in range(at_once):
                    take_answer(answers)


def take_answer(source: BinaryIO) -> None:
    """Read one answer to its end."""
    assert b" 200 " in source.readline()
    length = -1
    while line := source.readline().strip().lower():
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    if length >= 0:
        assert len(source.read(length)) == length
        return
    while size := int(source.readline(), 16):
        source.read(size + 2)
    source.readline()


def measure_round(subject: Subject, requests: int) -> None:
    """Start the server and measure its start, its rates and its memory."""
    with running(subject) as server:
        subject.note("first", server.first_answer * 1000)
        time.sleep(0.5)
        subject.note("resident", server.resident())
        for kind in subject.kinds:
            count = requests if kind == "json" else requests // 10
            before, started = server.processor_seconds(), time.perf_counter()
            ask(server.port, kind, count)
            subject.note(f"{kind}/s", count / (time.perf_counter() - started))
            subject.note(f"{kind}/cpu", count / (server.processor_seconds() - before))


def measure_memory(subject: Subject, counts: Sequence[int]) -> None:
    """Return its memory after a number of requests, a tenth of them in Prometheus' format."""
    with running(subject) as server:
        done = 0
        for count in counts:
            while done < count:
                kind = subject.kinds[-1 if done // BATCH % 10 == 9 else 0]
                ask(server.port, kind, BATCH, at_once=10)
                done += BATCH
            subject.note(f"resident {count}", server.resident())


def measure_idle(subject: Subject, seconds: float) -> None:
    """Return the share of a core that it takes without requests."""
    with running(subject) as server:
        time.sleep(6)  # it looks for its addresses at first
        before = server.processor_seconds()
        time.sleep(seconds)
        subject.note("idle", 100 * (server.processor_seconds() - before) / seconds)


def render_table(subjects: Sequence[Subject], counts: Sequence[int]) -> str:
    """Return the table in Markdown."""
    rows: list[tuple[str, Callable[[Subject], str]]] = [
        ("on disk, KB", lambda each: f"{each.size / 1024:,.0f}"),
        ("first answer after the start, ms", lambda each: f"{each['first']:.0f}"),
        ("resident after the start, MB", lambda each: f"{each['resident']:.1f}"),
        *(
            (f"resident after {count:,} requests, MB", resident(f"resident {count}"))
            for count in counts
        ),
        ("JSON, requests/s", rate("json/s")),
        ("JSON, requests per second of one core's time", rate("json/cpu")),
        ("Prometheus' format, requests/s", rate("text/s")),
        ("Prometheus' format, requests per second of one core's time", rate("text/cpu")),
        ("idle, % of a core", lambda each: f"{each['idle']:.2f}"),
    ]
    header = "| | " + " | ".join(each.name for each in subjects) + " |"
    lines = [header, "|---|" + "---|" * len(subjects)]
    lines += [
        f"| {name} | " + " | ".join(show(each) for each in subjects) + " |" for name, show in rows
    ]
    return "\n".join(lines)


def rate(name: str) -> Callable[[Subject], str]:
    """Return a rate as text, or a dash."""
    return lambda each: f"{each[name]:,.0f}" if name in each.figures else "-"


def resident(name: str) -> Callable[[Subject], str]:
    """Return an amount of memory as text."""
    return lambda each: f"{each[name]:.1f}" if name in each.figures else "-"


def render_ratios(subjects: Mapping[str, Subject], count: int) -> str:
    """Return how node_exporter compares with the agent on the runtime."""
    ours, theirs = subjects[RUNTIME], subjects[EXPORTER]
    memory = f"resident {count}"
    ratios = {
        "size on disk": theirs.size / ours.size,
        f"memory after {count:,} requests": theirs[memory] / ours[memory],
        "time to the first answer": theirs["first"] / ours["first"],
        "processor time of a scrape": ours["text/cpu"] / theirs["text/cpu"],
    }
    listed = ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items())
    return f"{EXPORTER}, which has more metrics, divided by the agent on the runtime: {listed}."


def missed_targets(
    subjects: Mapping[str, Subject], program: Path, counts: Sequence[int]
) -> list[str]:
    """Return the planned figures that were not reached."""
    ours = subjects[RUNTIME]
    first, last = (f"resident {count}" for count in counts)
    cpython = next(each for name, each in subjects.items() if name.startswith("CPython 3"))
    targets = {
        "the archive has at most 40 KB": program.stat().st_size <= 40 << 10,
        "the runtime has at most 480 KB": ours.files[0].stat().st_size <= 480 << 10,
        "at most 2.5 MB on the runtime": ours[first] <= 2.5,
        "the same after more requests": ours[last] <= ours[first] * 1.05 + 0.1,
        "at most 12 MB on CPython 3": cpython[first] <= 12,
        "first answer within 50 ms": ours["first"] <= 50,
        "1,000 requests a second": ours["json/cpu"] >= 1000,
        "idle, at most 0.1 % of a core": ours["idle"] <= 0.1,
    }
    return [name for name, reached in targets.items() if not reached]


def describe_host(rounds: int) -> str:
    """Return the date and the host of the measurement."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    today = time.strftime("%Y-%m-%d", time.gmtime())
    exporter = unpacked("prometheus-node-exporter") / "usr/bin/prometheus-node-exporter"
    done = subprocess.run([exporter, "--version"], capture_output=True, text=True, check=True)
    version = (done.stdout + done.stderr).split("version ")[1].split()[0]
    return (
        f"Measured on {today} by `nox -s bench`: {model}, {cores} cores,"
        f" Linux {platform.release()};"
        f" medians of {rounds} rounds in turn, on loopback, one keep-alive connection;"
        f" node_exporter {version} of Debian with its default collectors."
        " On disk, a guest's own Python is not counted."
    )


def write_between_markers(document: Path, text: str) -> None:
    """Replace the text between the markers."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{document} has no {BEGIN}"
    assert end, f"{document} has no {END}"
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Measure, print and write; return 1 if a planned figure was not reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3000, help="in each round")
    parser.add_argument("--memory", type=int, nargs=2, default=(5000, 100000), help="requests")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds")
    parser.add_argument("--no-write", action="store_true", help="leave the documentation alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subjects = find_subjects(Path(folder))
        for _ in range(options.rounds):
            for subject in subjects:
                measure_round(subject, options.requests)
        for subject in subjects:
            measure_idle(subject, options.idle)
            # a scrape of node_exporter takes too long for more
            counts = options.memory[:1] if subject.name == EXPORTER else options.memory
            measure_memory(subject, counts)
            sys.stderr.write(f"{subject.name}: done\n")
        named = {subject.name: subject for subject in subjects}
        table = render_table(subjects, options.memory)
        text = "\n\n".join(
            [describe_host(options.rounds), table, render_ratios(named, options.memory[0])]
        )
        missed = missed_targets(named, Path(folder) / AGENT, options.memory)
    sys.stdout.write(text + "\n")
    for name in missed:
        sys.stdout.write(f"NOT REACHED: {name}\n")
    if not options.no_write:
        write_between_markers(DOCUMENT, text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
