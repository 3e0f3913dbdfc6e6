"""The programs that the agent starts: what they see, what they cost, and what is left of them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require_root
from vmprovision.agent import compat, delivery
from vmprovision.agent.tasks import Outcome, flow, run_program

from .agents import Agent, build_program, free_port, running_agent, running_manager
from .interpreters import Interpreter
from .test_process import ONE_OF_EACH, await_addresses, without_tables, write_command
from .test_pure import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

IP_HANGS = "exec sleep 60\n"


def open_files(agent: Agent) -> int:
    """Return the number of descriptors that the agent holds."""
    return len(list(Path(f"/proc/{agent.run.pid}/fd").iterdir()))


def children(agent: Agent) -> list[str]:
    """Return the agent's children, zombies included."""
    return Path(f"/proc/{agent.run.pid}/task/{agent.run.pid}/children").read_text().split()


def under(interpreter: Interpreter, *prefix: str) -> Interpreter:
    """Return the interpreter, started by another program."""
    return Interpreter(name=interpreter.name, argv=(*prefix, *interpreter.argv))


def await_true(is_so: object, seconds: float = 20.0) -> None:
    """Return when the function says yes."""
    assert callable(is_so)
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nobody_else_may_read_what_the_agent_makes(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """With the loosest umask the token's file and the log are still their user's only."""
    script = (
        f"stat -L -c %a /proc/self/fd/0 >{tmp_path}/mode; umask >{tmp_path}/umask; printf 200\n"
    )
    write_command(tmp_path / "bin", "curl", script)
    write_command(tmp_path / "bin", "ip", "echo '2: ens3  inet 10.9.0.1/24 scope global'\n")
    loose = under(interpreter, "sh", "-c", 'umask 0; exec "$@"', "sh")
    with running_agent(
        *(loose, program, tmp_path),
        config="VM_ID=a\nTOKEN=t0k3n\nMANAGER_URL=https://manager.invalid\n",
        environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        arguments=[*without_tables(tmp_path), "--log-file", str(tmp_path / "log")],
    ):
        await_true(lambda: "reported" in (tmp_path / "log").read_text())
    assert (tmp_path / "mode").read_text() == "600\n"
    assert (tmp_path / "umask").read_text() == "0022\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def loose_umask() -> Iterator[None]:
    """Let every user read the files."""
    former = os.umask(0)
    yield
    os.umask(former)


@pytest.mark.usefixtures("loose_umask")
def test_a_file_without_a_name_never_was_anybodys(tmp_path: Path) -> None:
    """It is private from its first moment on, and its folder is left as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
        with compat.unnamed_file(b"secret") as unnamed:
            status = os.fstat(unnamed.fileno())
            assert status.st_mode & 0o777 == 0o600
            assert (status.st_nlink, unnamed.read()) == (0, b"secret")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_process_leaks_nothing(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """An agent that may start no process still serves, and holds no more files than before."""
    require_root()
    limited = under(interpreter, "prlimit", "--nproc=1", "--")
    with running_agent(
        *(limited, program, tmp_path),
        config="VM_ID=a\nMANAGER_URL=https://manager.invalid\n",
        arguments=[*without_tables(tmp_path), "--user", "nobody"],
    ) as agent:
        agent.await_log("addresses: none")
        used = open_files(agent)
        for number in range(10):
            agent.run.send_signal(signal.SIGHUP)  # it begins anew at once
            agent.await_log(f"(?s)(reading the configuration again.*){{{number + 1}}}")
        assert agent.get("/health").status == 200
        assert open_files(agent) <= used
        assert "Traceback" not in agent.log_text()


def test_a_refused_process_is_reported() -> None:
    """The reason reaches whoever wanted the program, and no descriptor stays open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    outcome = Outcome()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path("/dev/null").open("rb") as lowest:  # other numbers may have gaps above it
        limit = lowest.fileno() + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        assert list(run_program(("true",), 1.0, outcome, compat.Clock(), b"input")) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert outcome.status is None
    assert outcome.failure == "Too many open files"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_look_at_a_program_ends_whatever_it_writes() -> None:
    """As much as a pipe holds is read at a time, from what never is empty as well."""

    def give_up(*_: object) -> None:
        pytest.fail("it reads on and on")

    child = compat.Child(("sleep", "60"))
    with Path("/dev/zero").open("rb") as endless:
        os.dup2(endless.fileno(), child._out)  # noqa: SLF001 -- a pipe may be empty for a moment
    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    try:
        assert child.poll() is None
        assert child.poll() is None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        child.kill()


def test_an_inherited_sigchld_does_no_harm(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Started with SIGCHLD ignored, the agent still learns how its programs ended."""
    write_command(tmp_path / "bin", "ip", "echo '2: ens3  inet 10.9.0.1/24 scope global'\n")
    ignoring = under(interpreter, "env", "--ignore-signal=CHLD")
    with running_agent(
        *(ignoring, program, tmp_path),
        environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        arguments=without_tables(tmp_path),
    ) as agent:
        assert await_addresses(agent) == ["10.9.0.1"]


def test_a_reload_ends_the_program_under_way(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Ten reloads while ``ip`` hangs leave one program, which runs, and no zombie or descriptor."""
    write_command(tmp_path / "bin", "ip", IP_HANGS)
    with running_agent(
        *(interpreter, program, tmp_path),
        environment={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        arguments=without_tables(tmp_path),
    ) as agent:
        await_true(lambda: children(agent))
        used = open_files(agent)
        for number in range(10):
            before = children(agent)
            agent.run.send_signal(signal.SIGHUP)
            agent.await_log(f"(?s)(reading the configuration again.*){{{number + 1}}}")
            await_true(lambda: children(agent) not in (before, []))  # noqa: B023
        await_true(lambda: len(children(agent)) == 1)
        await_true(lambda: open_files(agent) <= used)  # while one starts there are more


@pytest.mark.parametrize("path", ["", ".", "bin:", ":/nonexistent", "../here/bin"])
@ONE_OF_EACH
def test_programs_are_never_the_current_directorys(
    interpreter: Interpreter, program: Path, tmp_path: Path, path: str
) -> None:
    """An empty or relative word in PATH runs nothing that lies where the agent was started."""
    folder = tmp_path / "here"
    for place in (folder, folder / "bin"):
        place.mkdir(exist_ok=True)
        for name in ("ip", "ifconfig", "python3"):
            write_command(place, name, f"touch {tmp_path}/trap\n")
    with running_agent(
        *(interpreter, program, folder),
        environment={"PATH": path},
        arguments=without_tables(tmp_path),
    ) as agent:
        agent.await_log("addresses: ")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("path", ["", ".", "bin:", ":/nonexistent", "../here/bin", None])
def test_the_launcher_runs_no_python_of_the_current_directory(
    tmp_path: Path, path: str | None
) -> None:
    """It passes over empty and relative words in PATH, and still finds the guest's Python."""
    folder = tmp_path / "here"
    for place in (folder, folder / "bin"):
        place.mkdir(exist_ok=True)
        for name in ("python3", "python", "python2"):
            write_command(place, name, f"touch {tmp_path}/trap\n")
    run = subprocess.run(
        ["/bin/sh", str(build_program(tmp_path)), "--version"],
        env={} if path is None else {"PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert not (tmp_path / "trap").exists()
    assert (run.returncode, run.stdout[:12]) == (0, "guest-agent "), run.stderr


def test_programs_get_no_secrets() -> None:
    """Neither token is in a program's environment, and what else there is stays."""
    given = {"TOKEN": "a", "READ_TOKEN": "b", "GUEST_AGENT_FILE0": "TOKEN=c", "HTTPS_PROXY": "d"}
    assert compat.program_environment(given) == {
        "HTTPS_PROXY": "d",
        "LANG": "C",
        "LC_ALL": "C",
        "PATH": compat.COMMAND_PATH,
    }


def test_tasks_are_closed_from_the_inside() -> None:
    """Closing a flow closes every task in it, and a failure goes to the task that asked."""
    said = []

    def inner(*, fails: bool) -> Iterator[object]:
        try:
            yield 1
            if fails:
                raise ValueError("inner")
            yield 2
        finally:
            said.append("inner ends")

    def outer() -> Iterator[object]:
        try:
            yield inner(fails=False)
            yield inner(fails=True)
        except ValueError as error:
            said.append(str(error))
            yield 3
        finally:
            said.append("outer ends")

    assert list(flow(outer())) == [1, 2, 1, 3]
    assert said == ["inner ends", "inner ends", "inner", "outer ends"]
    said.clear()
    running = flow(outer())
    next(running)
    running.close()
    assert said == ["inner ends", "outer ends"]


@pytest.mark.parametrize("families", [[99, 2], [2], [99]])
def test_a_family_that_is_off_is_one_target_less(families: list[int]) -> None:
    """Where no socket of the first family can be had, the manager's other addresses are tried."""
    with running_manager(200) as manager:
        settings, _ = parse(f"VM_ID=a\nMANAGER_URL=http://127.0.0.1:{manager.port}\n")
        targets = [(family, ("127.0.0.1", manager.port)) for family in families]
        outcome, clock = Outcome(), compat.Clock()
        task = delivery.deliver_by_socket(settings, "10.9.0.1", targets, outcome, clock)
        for pause in flow(task):
            time.sleep(pause)
    assert (outcome.failure is None) is (2 in families)
    if 2 not in families:
        assert outcome.failure == os.strerror(97)
        assert outcome.hopeless  # and no program would fare better


def test_a_reports_failure_names_the_reason() -> None:
    """A manager that is down is reported in the system's own words."""
    settings, _ = parse(f"VM_ID=a\nMANAGER_URL=http://127.0.0.1:{free_port()}\n")
    outcome, clock = Outcome(), compat.Clock()
    assert settings.manager is not None
    targets = compat.resolve("127.0.0.1", settings.manager.port)
    for pause in flow(delivery.deliver_by_socket(settings, "a", targets, outcome, clock)):
        time.sleep(pause)
    assert outcome.failure == "Connection refused"
    assert json.loads(json.dumps(outcome.hopeless))
