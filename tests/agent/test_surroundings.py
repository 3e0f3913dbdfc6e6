"""The agent in odd surroundings: locales, pipes that nobody empties, FIFOs, full disks."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .agents import Agent, await_answer, free_port, running_agent, stop
from .test_process import run_to_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .interpreters import Interpreter

# An old CPython knows ASCII only there, also for the names of files.
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """Return a /proc whose processor was nearly idle since boot, and is busy now."""
    ended = threading.Event()

    def work() -> None:
        ticks = 0
        while not ended.wait(0.02):
            ticks += 2
            new = tmp_path / "new"
            new.write_text(f"cpu {ticks} 0 0 1000000 0 0 0 0\ncpu0 {ticks} 0 0 1000000 0 0 0 0\n")
            new.rename(tmp_path / "stat")

    (tmp_path / "stat").write_text("cpu 0 0 0 1000000 0 0 0 0\ncpu0 0 0 0 1000000 0 0 0 0\n")
    thread = threading.Thread(target=work)
    thread.start()
    yield tmp_path
    ended.set()
    thread.join()


def test_once_measures_its_half_second(interpreter: Interpreter, program: Path, busy: Path) -> None:
    """The processors' figures are those of now, and not the mean since the guest booted."""
    answer = json.loads(run_to_end(interpreter, program, "once", "--proc", str(busy)).stdout)
    assert answer["cpu_usage_percent"] == 100.0
    assert answer["cpus"] == {"cpu0": 100.0}


def test_names_that_are_not_ascii_in_the_c_locale(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Mount points, the log file, sockets, the configuration and names from the environment."""
    folder = tmp_path / "caf\xe9"
    (tmp_path / "proc/self").mkdir(parents=True)
    folder.mkdir()
    line = f"9 1 8:1 / {folder} rw - ext4 /dev/a rw\n"
    (tmp_path / "proc/self/mountinfo").write_text(line, encoding="utf-8")
    config = f"LOG_FILE={folder}/log\nVM_ID=w\xe9b\n"
    (folder / "agent.conf").write_text(config, encoding="utf-8")
    with running_agent(
        *(interpreter, program, tmp_path),
        listen=f"127.0.0.1,unix:{folder}/sock",
        arguments=["--config", f"{folder}/agent.conf", "--proc", f"{tmp_path}/proc"],
        environment=C_LOCALE,
    ) as agent:
        (found,) = json.loads(agent.get("/metrics").body)["file_systems"]
        assert found["mountpoint"] == str(folder)
        text = agent.get("/metrics", accept="text/plain").body.decode()
        assert f'mountpoint="{folder}"}} 0\n' in text
        assert json.loads(agent.get("/info").body)["vm_id"] == "w\xe9b"
        assert (folder / "sock").is_socket()
        assert "listening on" in (folder / "log").read_text()


def test_nobody_reads_the_log(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """A standard error that is a full pipe loses lines, and the agent goes on."""
    reading, writing = os.pipe()
    size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"x" * size)
    port = free_port()
    argv = [*interpreter.argv, str(program), "--port", str(port), "--listen", "127.0.0.1"]
    with subprocess.Popen([*argv, "--config", str(tmp_path / "none")], stderr=writing) as run:
        try:
            agent = Agent(port=port, log=tmp_path / "none", run=run, started=0.0)
            (tmp_path / "none").touch()
            await_answer(agent)
            assert agent.get("/health").status == 200
            run.send_signal(signal.SIGHUP)
            assert agent.get("/health").status == 200
            assert select.select([], [writing], [], 0)[1] == []
            os.read(reading, size)  # from here on there is room again
            run.send_signal(signal.SIGHUP)
            assert b"reading the configuration again\n" in os.read(reading, size)
        finally:
            stop(run)
            os.close(reading)
            os.close(writing)


@pytest.mark.parametrize("read", [True, False])
def test_a_fifo_as_a_log_file(
    interpreter: Interpreter,
    program: Path,
    tmp_path: Path,
    read: bool,  # noqa: FBT001 -- a case
) -> None:
    """It holds nothing up, whether or not somebody reads it."""
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if read else -1
    with running_agent(interpreter, program, tmp_path, config=f"LOG_FILE={fifo}\n") as agent:
        assert agent.get("/health").status == 200
        if read:
            assert b"listening on" in os.read(reader, 4096)
            os.close(reader)
            agent.run.send_signal(signal.SIGHUP)
        else:
            agent.await_log("cannot open log file .*/log: ")
        assert agent.get("/health").status == 200


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_a_configuration_that_is_no_file(
    interpreter: Interpreter, program: Path, tmp_path: Path, kind: str
) -> None:
    """It is said, and the defaults are taken: nothing waits for somebody to write there."""
    path = tmp_path / "conf"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        subprocess.run(
            ["python3", "-c", f"import socket; socket.socket(1).bind({str(path)!r})"], check=True
        )
    with running_agent(interpreter, program, tmp_path, arguments=["--config", str(path)]) as agent:
        agent.await_log("no configuration: .*/conf")
        assert agent.get("/health").status == 200
        agent.run.send_signal(signal.SIGHUP)
        agent.await_log("reading the configuration again")
        assert agent.get("/health").status == 200
    check = run_to_end(interpreter, program, "check", "--config", str(path), "--port", "1")
    assert "Traceback" not in check.stderr


@pytest.mark.parametrize("word", ["once", "check", "--version", "--help"])
def test_output_that_cannot_be_written(
    interpreter: Interpreter, program: Path, tmp_path: Path, word: str
) -> None:
    """A closed or a full standard output is one line and status 1; a closed error is bearable."""
    command = " ".join([*interpreter.argv, str(program), word, "--config", str(tmp_path / "none")])
    for redirection, reason in ((">&-", "Bad file"), (">/dev/full", "No space"), ("2>&- >&-", "")):
        run = subprocess.run(
            ["sh", "-c", f"exec {command} {redirection}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.count("\n") == bool(reason)
        assert reason in run.stderr
    quiet = subprocess.run(
        ["sh", "-c", f"exec {command} 0<&- 2>&-"], check=False, capture_output=True, timeout=60
    )
    assert quiet.returncode in (0, 1)
    assert quiet.stdout


def test_an_agent_that_inherits_nothing(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """With all of 0 to 2 closed no socket takes their place and what is logged goes nowhere."""
    port = free_port()
    argv = [*interpreter.argv, str(program), "--port", str(port), "--listen", "127.0.0.1"]
    command = " ".join([*argv, "--config", str(tmp_path / "none")])
    with subprocess.Popen(["sh", "-c", f"exec {command} 0<&- 1>&- 2>&-"]) as run:
        try:
            (tmp_path / "log").touch()
            agent = Agent(port=port, log=tmp_path / "log", run=run, started=0.0)
            await_answer(agent)
            for number in range(3):
                assert not Path(f"/proc/{run.pid}/fd/{number}").is_socket()
            assert agent.get("/health").status == 200
            run.send_signal(signal.SIGHUP)
            assert agent.get("/health").status == 200
        finally:
            stop(run)
