"""How agents of every interpreter report their address, to real HTTP servers on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.agent import compat, delivery
from vmprovision.agent.reporting import Retries
from vmprovision.agent.tasks import Outcome, flow

from .agents import Agent, Manager, black_hole, free_port, running_agent, running_manager
from .interpreters import Interpreter, get_interpreter, interpreter_names
from .test_process import ONE_OF_EACH, without_tables, write_command
from .test_pure import parse, run_now

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HANGING_SECONDS = 5.0  # of a report without an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporting:
    """An agent, its manager and the file with the address it will find."""

    agent: Agent
    manager: Manager
    address: Path


@contextmanager
def fake_address(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a file that holds the guest's address, and the environment that applies it."""
    folder.mkdir(parents=True, exist_ok=True)
    address = folder / "address"
    address.write_text("10.9.0.1")
    write_command(folder / "bin", "ip", f'echo "2: ens3  inet $(cat {address})/24 scope global"\n')
    yield address, {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


@contextmanager
def reporting_agent(
    interpreter: Interpreter, program: Path, folder: Path, manager: Manager
) -> Iterator[Reporting]:
    """Return an agent that reports to the manager, whose /proc/net is a folder of ours."""
    with fake_address(folder) as (address, environment):
        (folder / "proc" / "net").mkdir(parents=True)
        config = f"VM_ID=web 1/ü\nTOKEN=t0k3n\nMANAGER_URL=http://127.0.0.1:{manager.port}/base/\n"
        arguments = ["--proc", str(folder / "proc")]
        with running_agent(
            *(interpreter, program, folder),
            config=config,
            environment=environment,
            arguments=arguments,
        ) as agent:
            yield Reporting(agent=agent, manager=manager, address=address)


@pytest.fixture(scope="session")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, program: Path
) -> Iterator[dict[str, Reporting]]:
    """Return reporting agents of all interpreters, started together so that their waits overlap.

    Their managers answer 404, then 500, then 200.
    """
    with ExitStack() as stack:
        found = {}
        for name in interpreter_names():
            try:
                interpreter = get_interpreter(name)
            except pytest.skip.Exception:
                continue  # the test of this interpreter skips with the reason
            manager = stack.enter_context(running_manager(404, 500, 200))
            folder = tmp_path_factory.mktemp("fleet")
            found[name] = stack.enter_context(
                reporting_agent(interpreter, program, folder, manager)
            )
        yield found


@pytest.fixture
def reporting(interpreter: Interpreter, fleet: dict[str, Reporting]) -> Reporting:
    """Return the fleet's agent of this interpreter."""
    return fleet[interpreter.name]


def test_reports_are_what_managers_expect(reporting: Reporting) -> None:
    """A report is a POST with the right path, headers and JSON body."""
    report = reporting.manager.await_reports(1)[0]
    assert report.method == "POST"
    assert report.path == "/base/v1/vms/web%201%2F%C3%BC/guest-ip"
    assert report.headers["Host"] == f"127.0.0.1:{reporting.manager.port}"
    assert report.headers["Content-Type"] == "application/json"
    assert report.headers["Authorization"] == "Bearer t0k3n"
    assert report.body == b'{"guest_ip":"10.9.0.1"}'


def test_refused_reports_are_repeated(reporting: Reporting) -> None:
    """The first report comes after 3 s, and after a 404 and a 500 others follow within 5 s."""
    reports = reporting.manager.await_reports(3)
    assert 2.5 < reports[0].moment - reporting.agent.started < 6
    for earlier, later in pairwise(reports[:3]):
        assert 3.9 < later.moment - earlier.moment < 7
    log = reporting.agent.await_log("reported 10.9.0.1")
    assert log.count("the manager answered 404") == 1
    assert log.count("the manager answered 500") == 1
    assert "t0k3n" not in log


@pytest.fixture(scope="session")
def moved(fleet: dict[str, Reporting]) -> float:
    """Change the fleet's addresses once all have reported the first one; return when."""
    for reporting in fleet.values():
        reporting.agent.await_log("reported 10.9.0.1", seconds=30)
    for reporting in fleet.values():
        reporting.address.write_text("10.9.0.77")
        (reporting.address.parent / "proc" / "net" / "if_inet6").write_text("changed\n")
    return time.monotonic()


def test_a_new_address_is_reported_soon(reporting: Reporting, moved: float) -> None:
    """After a success the next report is due in 30 s, but a change in the kernel brings it on."""
    reporting.agent.await_log("reported 10.9.0.77", seconds=10)
    bodies = [json.loads(report.body)["guest_ip"] for report in reporting.manager.reports]
    first = reporting.manager.reports[bodies.index("10.9.0.77")]
    assert first.moment - moved < 8


@pytest.fixture(scope="session")
def black_holed(
    tmp_path_factory: pytest.TempPathFactory, program: Path
) -> Iterator[dict[str, tuple[Agent, float]]]:
    """Return agents whose manager swallows packets, and the slowest answer of each meanwhile.

    A second client of each stops in the middle of its request; the fixture
    lasts until the agents have put up with that for long enough.
    """
    with ExitStack() as stack:
        port = stack.enter_context(black_hole())
        agents = {}
        for name in interpreter_names():
            try:
                interpreter = get_interpreter(name)
            except pytest.skip.Exception:
                continue  # the test of this interpreter skips with the reason
            folder = tmp_path_factory.mktemp("black-hole")
            _, environment = stack.enter_context(fake_address(folder))
            agents[name] = stack.enter_context(
                running_agent(
                    *(interpreter, program, folder),
                    config=f"VM_ID=a\nMANAGER_URL=http://127.0.0.1:{port}\n",
                    environment=environment,
                    arguments=without_tables(folder),
                )
            )
        slowest = dict.fromkeys(agents, 0.0)
        dawdlers = [stack.enter_context(agent.connect()) for agent in agents.values()]
        opened = time.monotonic()
        for sock in dawdlers:
            sock.sendall(b"GET /health HTTP/1.1\r\nHo")
        while time.monotonic() - opened < 9 or not all(
            f"no answer in {HANGING_SECONDS} s" in agent.log_text() for agent in agents.values()
        ):
            for name, agent in agents.items():
                before = time.monotonic()
                assert before - agent.started < 30, agent.log_text()
                assert agent.get("/metrics").status == 200
                slowest[name] = max(slowest[name], time.monotonic() - before)
            time.sleep(0.05)
        for sock in dawdlers:
            assert sock.recv(1) == b""
        assert 9 < time.monotonic() - opened < 18
        yield {name: (agent, slowest[name]) for name, agent in agents.items()}


def test_a_silent_manager_delays_no_answer(
    interpreter: Interpreter, black_holed: dict[str, tuple[Agent, float]]
) -> None:
    """No answer waits for a report, which hangs for its 5 s; dawdlers must go."""
    agent, slowest = black_holed[interpreter.name]
    assert slowest < HANGING_SECONDS / 2  # a loaded host takes more than a second for an answer
    assert "Traceback" not in agent.log_text()


@ONE_OF_EACH
def test_https_goes_through_curl(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """For https the token reaches curl on its input, not in its arguments, and 204 is a success."""
    script = f'echo "$*" > {tmp_path}/arguments; cat > {tmp_path}/input; printf 204\n'
    write_command(tmp_path / "bin", "curl", script)
    write_command(tmp_path / "bin", "ip", "echo '2: ens3  inet 10.9.0.1/24 scope global'\n")
    with running_agent(
        *(interpreter, program, tmp_path),
        config="VM_ID=a\nTOKEN=t0k3n\nMANAGER_URL=https://[fd00::1]:8443/x\n",
        environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        arguments=without_tables(tmp_path),
    ) as agent:
        agent.await_log("reported 10.9.0.1")
    assert "t0k3n" not in (tmp_path / "arguments").read_text()
    given = (tmp_path / "input").read_text().splitlines()
    assert 'url = "https://[fd00::1]:8443/x/v1/vms/a/guest-ip"' in given
    assert 'header = "Authorization: Bearer t0k3n"' in given
    assert 'data = "{\\"guest_ip\\":\\"10.9.0.1\\"}"' in given


@pytest.mark.parametrize(
    ("program", "place", "prefix"),
    [
        *(("curl", 0, ()), ("wget", 1, ()), ("busybox", 2, ("busybox",))),
        *(("nc", -1, ()), ("busybox", -1, ("busybox",))),
    ],
    ids=["curl", "wget", "busybox-wget", "nc", "busybox-nc"],
)
def test_real_programs_deliver(program: str, place: int, prefix: tuple[str, ...]) -> None:
    """The arguments for curl, wget, nc and those of busybox make them send a valid report."""
    require(shutil.which(program), f"{program} is not installed")
    token = "" if place == 2 else "TOKEN=t0k3n\n"
    with running_manager(200) as manager:
        settings, lines = parse(f"VM_ID=a b\n{token}MANAGER_URL=http://127.0.0.1:{manager.port}\n")
        argv, stdin = delivery.programs(settings, "10.9.0.1")[place]
        outcome = run_now((*prefix, *argv), seconds=10, stdin=stdin)
        (report,) = manager.reports
    assert lines == []
    assert outcome.status == 0
    assert not any("t0k3n" in word for word in argv)
    if place == -1:
        assert delivery.parse_status(outcome.output) == 200
    assert report.path == "/v1/vms/a%20b/guest-ip"
    assert report.body == b'{"guest_ip":"10.9.0.1"}'
    assert report.headers["Content-Type"] == "application/json"
    assert report.headers.get("Authorization") == ("Bearer t0k3n" if token else None)


@pytest.mark.parametrize("place", [0, 1])
def test_real_programs_tell_a_refusal(place: int) -> None:
    """A 404 is not a success for curl or wget."""
    name = ("curl", "wget")[place]
    require(shutil.which(name), f"{name} is not installed")
    with running_manager(404) as manager:
        settings, _ = parse(f"VM_ID=a\nMANAGER_URL=http://127.0.0.1:{manager.port}\n")
        argv, stdin = delivery.programs(settings, "10.9.0.1")[place]
        outcome = run_now(argv, seconds=10, stdin=stdin)
    assert outcome.status not in (0, None)


NO_PROGRAM = "exit 127\n"


@pytest.mark.parametrize("left", ["curl", "wget", "busybox-wget", "nc"])
def test_programs_are_tried_in_turn(left: str, tmp_path: Path) -> None:
    """The first of curl, wget and nc that the guest has delivers; a refusal is none."""
    real = shutil.which("busybox" if left in ("busybox-wget", "nc") else left) or ""
    require(real, f"{left} is not installed")
    applet = left.rpartition("-")[2]
    for name in ("curl", "wget", "nc"):
        run = f'exec {real} {applet if "busybox" in real else ""} "$@"\n'
        write_command(tmp_path / "bin", name, run if name == applet else NO_PROGRAM)
    path = os.environ["PATH"]
    for status, failure in ((200, None), (404, "404|refused")):
        with running_manager(status) as manager:
            settings, _ = parse(f"VM_ID=a\nMANAGER_URL=http://127.0.0.1:{manager.port}\n")
            outcome = Outcome()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PATH", f"{tmp_path}/bin:{path}")
                clock = time.monotonic
                task = delivery.deliver_by_program(settings, "10.9.0.1", outcome, clock)
                for pause in flow(task):
                    time.sleep(pause)
        if failure and left != "busybox-wget":  # it does not tell what the server said
            assert re.search(failure, outcome.failure or "")
        assert (outcome.failure is None) is (failure is None)
        assert [report.body for report in manager.reports] == [b'{"guest_ip":"10.9.0.1"}']


@ONE_OF_EACH
def test_what_sockets_cannot_a_program_may(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A host name that only a program can look up is reported to through it."""
    write_command(tmp_path / "bin", "curl", f'echo "$*" >> {tmp_path}/ran\nprintf 200\n')
    write_command(tmp_path / "bin", "ip", "echo '2: ens3  inet 10.9.0.1/24 scope global'\n")
    with running_agent(
        *(interpreter, program, tmp_path),
        config="VM_ID=a\nMANAGER_URL=http://no-such-host.invalid\n",
        environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        arguments=without_tables(tmp_path),
    ) as agent:
        agent.await_log("reported 10.9.0.1", seconds=40)
    assert (tmp_path / "ran").read_text()


@ONE_OF_EACH
def test_no_program_is_started_for_a_manager_that_is_down(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Where nobody listens, curl would find nobody either."""
    write_command(tmp_path / "bin", "curl", f"touch {tmp_path}/ran\n")
    write_command(tmp_path / "bin", "ip", "echo '2: ens3  inet 10.9.0.1/24 scope global'\n")
    with running_agent(
        *(interpreter, program, tmp_path),
        config=f"VM_ID=a\nMANAGER_URL=http://127.0.0.1:{free_port()}\n",
        environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        arguments=without_tables(tmp_path),
    ) as agent:
        agent.await_log("reporting 10.9.0.1 failed")
    assert not (tmp_path / "ran").exists()


def test_retries_become_rarer_after_a_minute() -> None:
    """Five seconds for a minute of failures, then twice as long each, up to a minute."""
    retries = Retries()
    now, pauses = 100.0, []
    for _ in range(20):
        pauses.append(retries.next(now))
        now += pauses[-1]
    assert pauses == [5.0] * 13 + [10.0, 20.0, 40.0] + [60.0] * 4
    retries.begin()
    assert retries.next(now) == 5.0


def test_chance_differs() -> None:
    """Pauses are shortened by what the kernel draws, and by the clock where it draws nothing."""
    drawn = {compat.chance("/proc") for _ in range(50)}
    assert len(drawn) > 45
    assert all(0 <= each < 1 for each in drawn)
    assert 0 <= compat.chance("/nonexistent") < 1


@ONE_OF_EACH
def test_a_manager_is_found_by_name(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A host name in MANAGER_URL is looked up, and one that does not exist is only logged."""
    with running_manager(200) as manager, fake_address(tmp_path) as (_, environment):
        config = f"VM_ID=a\nMANAGER_URL=http://localhost:{manager.port}\n"
        arguments = without_tables(tmp_path)
        with running_agent(
            *(interpreter, program, tmp_path / "good"),
            config=config,
            environment=environment,
            arguments=arguments,
        ):
            report = manager.await_reports(1)[0]
        assert report.headers["Host"] == f"localhost:{manager.port}"
        assert "Authorization" not in report.headers
        config = "VM_ID=a\nMANAGER_URL=http://no-such-host.invalid\n"
        with running_agent(
            *(interpreter, program, tmp_path / "bad"),
            config=config,
            environment=environment,
            arguments=arguments,
        ) as agent:
            agent.await_log("no-such-host.invalid")
            assert agent.get("/health").status == 200
