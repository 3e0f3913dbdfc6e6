"""The agent as a process on every interpreter: command line, configuration, files, signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision.agent
from tests.conftest import require, require_root

from .agents import Agent, running_agent
from .interpreters import Interpreter, find_cpythons, one_of_each

if TYPE_CHECKING:
    from collections.abc import Mapping

ONE_OF_EACH = pytest.mark.parametrize("interpreter", one_of_each(), indirect=True)
STAT = "cpu  100 0 100 700 100 0 0 0\ncpu0 100 0 100 700 100 0 0 0\n"


def run_to_end(
    interpreter: Interpreter, program: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Return an agent that is expected to end by itself."""
    return subprocess.run(
        [*interpreter.argv, str(program), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def write_command(folder: Path, name: str, script: str) -> None:
    """Make a shell script that is found before the real command."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def await_addresses(agent: Agent, seconds: float = 8.0) -> list[str]:
    """Return the addresses in /info, once there are any."""
    deadline = time.monotonic() + seconds
    while True:
        addresses: list[str] = json.loads(agent.get("/info").body)["addresses"]
        if addresses or time.monotonic() > deadline:
            return addresses
        time.sleep(0.05)


def test_version_and_help(interpreter: Interpreter, program: Path) -> None:
    """The version and the usage go to standard output with status 0."""
    version = run_to_end(interpreter, program, "--version")
    assert version.returncode == 0
    assert version.stdout.startswith(f"guest-agent {vmprovision.agent.__version__} (")
    usage = run_to_end(interpreter, program, "--help")
    assert (usage.returncode, usage.stderr) == (0, "")
    assert "--config FILE" in usage.stdout


@pytest.mark.parametrize(
    "arguments", [("--nope",), ("--port",), ("--port", "99999"), ("--port=x",), ("extra",)]
)
def test_wrong_command_lines(
    interpreter: Interpreter, program: Path, arguments: tuple[str, ...]
) -> None:
    """A command line that makes no sense ends with status 2 and the usage."""
    run = run_to_end(interpreter, program, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith("guest-agent: ")
    assert "usage:" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_busy_port_is_one_clear_line(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """When it cannot listen it says so in one line and ends with status 1."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        run = run_to_end(
            *(interpreter, program, "--listen", "127.0.0.1", "--port", port),
            *("--config", str(tmp_path / "none")),
        )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: " in lines[0]
    assert "Traceback" not in run.stderr


def test_a_name_that_is_not_known_is_one_clear_line(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A resolver's error has its own numbers, and is reported in the resolver's words."""
    arguments = ("--listen", "no-such-host.invalid", "--config", str(tmp_path / "none"))
    run = run_to_end(interpreter, program, *arguments)
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if ": error: " in line]
    assert re.search("(?i)cannot listen on no-such-host.invalid .*: .*(name|address|resol)", line)
    assert "Unknown error" not in line
    assert "Traceback" not in run.stderr


def test_all_addresses_are_ipv4_and_ipv6(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Without LISTEN it answers on IPv4, and on IPv6 where this host has it."""
    with running_agent(interpreter, program, tmp_path, listen=None) as agent:
        assert agent.get("/health").status == 200
        if Path("/proc/net/if_inet6").exists():
            socket.create_connection(("::1", agent.port), timeout=5).close()


def test_sigterm_stops_it_at_once(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """SIGTERM ends an idle agent within a second, cleanly."""
    with running_agent(interpreter, program, tmp_path) as agent, agent.connect():
        agent.get("/health")
        agent.run.send_signal(signal.SIGTERM)
        assert agent.run.wait(1) == 0
        assert agent.log_text().rstrip().endswith("info: stopped")


def test_sigint_stops_it_cleanly(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """SIGINT ends it with status 0 on every interpreter."""
    with running_agent(interpreter, program, tmp_path) as agent:
        agent.get("/health")
        agent.run.send_signal(signal.SIGINT)
        assert agent.run.wait(1) == 0
        assert agent.log_text().rstrip().endswith("info: stopped")


def test_sighup_reads_the_configuration_again(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """After SIGHUP the new VM_ID shows in /info."""
    with running_agent(interpreter, program, tmp_path, config="VM_ID=old\n") as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "old"
        (tmp_path / "agent.conf").write_text("VM_ID=new\n")
        agent.run.send_signal(signal.SIGHUP)
        agent.await_log("reading the configuration again")
        assert json.loads(agent.get("/info").body)["vm_id"] == "new"


def test_a_bad_configuration_is_survived(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Bad values and lines are logged without secrets, and good ones still count."""
    config = (
        "\ufeff# comment\r\nPORT=abc\r\n\r\nnonsense\r\nUNKNOWN=1\r\nUNKNOWN=2\r\n"
        'TOKEN=se cret\r\nMANAGER_URL=ftp://x\r\nVM_ID="m-1" # first\r\nLISTEN=\x01\r\n'
    )
    with running_agent(interpreter, program, tmp_path, config=config) as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "m-1"
        log = agent.await_log("not reporting")
    assert "Traceback" not in log
    assert log.count("UNKNOWN is unknown") == 1
    for text in ("PORT is not", "line 4 is not KEY=VALUE", "TOKEN is", "MANAGER_URL is not"):
        assert text in log
    assert "cret" not in log


def test_the_environment_stands_in_for_an_unreadable_file(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """With a configuration it may not read, it takes the same keys from the environment."""
    secret = tmp_path / "secret.conf"
    secret.write_text("VM_ID=file\n")
    secret.chmod(0)
    if os.geteuid() == 0:
        reason = "as root this needs setpriv, which takes root's privilege to read all files"
        require(shutil.which("setpriv"), reason)
        dropped = "-dac_override,-dac_read_search"
        argv = ("setpriv", "--bounding-set", dropped, "--inh-caps", dropped, *interpreter.argv)
        interpreter = Interpreter(name=interpreter.name, argv=argv)
    with running_agent(
        *(interpreter, program, tmp_path),
        arguments=["--config", str(secret)],
        environment={"VM_ID": "from environment"},
    ) as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "from environment"
        assert "may not be read: using the environment" in agent.log_text()


def write_proc(folder: Path, files: Mapping[str, str]) -> Path:
    """Return a folder that looks like /proc."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_missing_kernel_files_give_null(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """With an empty /proc every figure is null and every answer is 200."""
    proc = tmp_path / "proc"
    proc.mkdir()
    arguments = ["--proc", str(proc)]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        response = agent.get("/metrics")
        assert response.status == 200
        metrics: dict[str, Any] = json.loads(response.body)
        assert len(metrics) == 17
        assert set(metrics.values()) == {None}
        exposition = agent.get("/metrics", accept="text/plain")
        assert exposition.status == 200
        assert b"guest_agent_build_info{" in exposition.body
        assert b"node_memory" not in exposition.body
        info = agent.get("/info")
        assert info.status == 200
        assert json.loads(info.body)["init"]["pid1"] is None
        assert agent.get("/health").status == 200


def test_an_old_kernel_is_measured(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """Short /proc/stat lines and a meminfo without MemAvailable give figures of the right type."""
    meminfo = "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 50 kB\nCached: 250 kB\n"
    proc = write_proc(
        tmp_path / "proc",
        {
            "stat": "cpu 100 0 100 800\n",
            "meminfo": meminfo,
            "uptime": "3600.00 7000.5\n",
            "loadavg": "1.00 0.5 0.25 1/80 999\n",
            "1/stat": "1 (init) S 0 1 1",
            "22/x": "",
            "self/x": "",
        },
    )
    arguments = ["--proc", str(proc)]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        text = agent.get("/metrics").body.decode()
        info = json.loads(agent.get("/info").body)
    assert text == (
        '{"cpu_usage_percent":20.0,"load_average":1.0,"memory_available_kb":400,'
        '"memory_total_kb":1000,"memory_usage_percent":60.0,"memory_used_kb":600,'
        '"process_count":2,"uptime_seconds":3600,'
        '"cpus":null,"disks":null,"file_systems":null,"load_average_15":0.25,'
        '"load_average_5":0.5,"networks":null,"pressure":null,'
        '"swap_total_kb":null,"swap_used_kb":null}\n'
    )
    assert info["init"]["pid1"] == "init"


def test_the_processor_is_sampled_while_idle(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """The usage of the last seconds is known without a request having waited for it."""
    proc = write_proc(tmp_path / "proc", {"stat": STAT})
    arguments = ["--proc", str(proc)]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        assert json.loads(agent.get("/metrics").body)["cpu_usage_percent"] == 20.0
        (proc / "stat").write_text("cpu  175 0 100 725 100 0 0 0\n")
        deadline = time.monotonic() + 4
        while json.loads(agent.get("/metrics").body)["cpu_usage_percent"] != 75.0:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def without_tables(folder: Path) -> list[str]:
    """Return the option that hides the kernel's tables, so that the agent asks programs."""
    (folder / "no-proc").mkdir(parents=True)
    return ["--proc", str(folder / "no-proc")]


ROUTES = {"net/route": "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"}
FIB_TRIE = """Local:
  +-- 0.0.0.0/0 3 0 5
     |-- 10.9.0.0
        /32 link BROADCAST
     |-- 10.9.0.4
        /32 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
"""
IP_ANSWERS = "echo '2: ens3    inet 10.9.0.1/24 brd 10.9.0.255 scope global ens3'\n"
IFCONFIG_ANSWERS = (
    "echo 'ens3: flags=4163<UP>  mtu 1500'; echo '        inet 10.9.0.2  netmask 1'\n"
)
ROUTE_ANSWERS = "[ \"$1\" = route ] && echo '1.0.0.0 via 10.9.0.9 dev ens3 src 10.9.0.3 uid 0'\n"
NOTHING = "exit 127\n"


@pytest.mark.parametrize(
    ("ip", "ifconfig", "address"),
    [
        (IP_ANSWERS, IFCONFIG_ANSWERS, "10.9.0.1"),
        (NOTHING, IFCONFIG_ANSWERS, "10.9.0.2"),
        (ROUTE_ANSWERS, NOTHING, "10.9.0.3"),
        ("head -c 300000 /dev/zero | tr '\\0' x\n", IFCONFIG_ANSWERS, "10.9.0.2"),
    ],
    ids=["ip", "ifconfig", "route-get", "flood"],
)
def test_each_way_to_the_address_is_reachable(  # noqa: PLR0913, PLR0917 -- fixtures and cases
    interpreter: Interpreter, program: Path, tmp_path: Path, ip: str, ifconfig: str, address: str
) -> None:
    """Without tables of the kernel's, the later commands tell what the earlier ones do not."""
    write_command(tmp_path / "bin", "ip", ip)
    write_command(tmp_path / "bin", "ifconfig", ifconfig)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    arguments = without_tables(tmp_path)
    with running_agent(
        interpreter, program, tmp_path, environment=environment, arguments=arguments
    ) as agent:
        assert await_addresses(agent) == [address]
        assert agent.get("/health").status == 200


@pytest.mark.parametrize(
    ("ip", "ifconfig", "address"),
    [
        ("exec cat /dev/zero\n", IFCONFIG_ANSWERS, "10.9.0.2"),
        ("cat /dev/zero &\n", IFCONFIG_ANSWERS, "10.9.0.2"),
        (ROUTE_ANSWERS, "exec yes 'ens3: flags=4163<UP>  mtu 1500'\n", "10.9.0.3"),
    ],
    ids=["ip", "child-of-ip", "ifconfig"],
)
@ONE_OF_EACH
def test_a_program_that_writes_without_end_holds_nothing_up(  # noqa: PLR0913, PLR0917 -- as above
    interpreter: Interpreter, program: Path, tmp_path: Path, ip: str, ifconfig: str, address: str
) -> None:
    """The agent answers while it runs, ends it, little of it in memory, and asks the next."""
    write_command(tmp_path / "bin", "ip", ip)
    write_command(tmp_path / "bin", "ifconfig", ifconfig)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with running_agent(
        *(interpreter, program, tmp_path),
        environment=environment,
        arguments=without_tables(tmp_path),
    ) as agent:
        assert agent.get("/health").status == 200
        assert await_addresses(agent, 60) == [address]


def test_the_tables_are_read_without_a_program(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Where the kernel tells the addresses, no program is started for them."""
    for name in ("ip", "ifconfig"):
        write_command(tmp_path / "bin", name, f"touch {tmp_path}/started; {IP_ANSWERS}")
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    proc = write_proc(tmp_path / "proc", {**ROUTES, "net/fib_trie": FIB_TRIE})
    arguments = ["--proc", str(proc)]
    with running_agent(
        interpreter, program, tmp_path, environment=environment, arguments=arguments
    ) as agent:
        assert await_addresses(agent) == ["10.9.0.4"]
    assert not (tmp_path / "started").exists()


def test_commands_get_a_clean_environment(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A command finds the C locale, the sbin folders, no input, no token and no sockets of ours."""
    script = (
        f'echo "$LC_ALL|$LANG|$TOKEN|$PATH|$(cat | wc -c)" > {tmp_path}/seen\n'
        f"ls -l /proc/self/fd > {tmp_path}/open\n{IP_ANSWERS}"
    )
    write_command(tmp_path / "bin", "ip", script)
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "LC_ALL": "de_DE.UTF-8",
        "TOKEN": "secret",
    }
    with running_agent(
        *(interpreter, program, tmp_path),
        environment=environment,
        arguments=without_tables(tmp_path),
    ) as agent:
        assert await_addresses(agent) == ["10.9.0.1"]
    locale, lang, token, path, size = (tmp_path / "seen").read_text().strip().split("|")
    assert (locale, lang, token, size) == ("C", "C", "", "0")
    assert {"/sbin", "/usr/sbin", "/usr/local/sbin"} <= set(path.split(":"))
    assert "socket:" not in (tmp_path / "open").read_text()


@ONE_OF_EACH
def test_a_command_that_hangs_is_given_up(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """While ``ip`` hangs clients are served, and after its time limit ifconfig is asked."""
    write_command(tmp_path / "bin", "ip", f"echo $$ >> {tmp_path}/pids; exec sleep 30\n")
    write_command(tmp_path / "bin", "ifconfig", IFCONFIG_ANSWERS)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with running_agent(
        *(interpreter, program, tmp_path),
        environment=environment,
        arguments=without_tables(tmp_path),
    ) as agent:
        started = time.monotonic()
        while not await_addresses(agent, seconds=0):
            assert time.monotonic() - started < 9
            time.sleep(0.1)
        assert await_addresses(agent) == ["10.9.0.2"]
        # The first ip was killed; the next round may have begun since.
        (pid, *_) = (tmp_path / "pids").read_text().split()
        assert not Path(f"/proc/{pid}/exe").exists()


def test_no_children_are_left_behind(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """After addresses were found the agent has neither children nor open files of theirs."""
    with running_agent(interpreter, program, tmp_path) as agent:
        agent.await_log("addresses: ")
        children = Path(f"/proc/{agent.run.pid}/task/{agent.run.pid}/children")
        deadline = time.monotonic() + 10
        while children.read_text():  # it looks again after three seconds
            assert time.monotonic() < deadline
            time.sleep(0.05)
        links = []
        for link in Path(f"/proc/{agent.run.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                links.append(str(link.readlink()))
    assert not [link for link in links if "deleted" in link]


@ONE_OF_EACH
def test_running_out_of_descriptors_is_survived(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Out of file descriptors it rests instead of spinning, and serves again afterwards."""
    with running_agent(interpreter, program, tmp_path) as agent:
        agent.await_log("addresses: ")
        used = len(list(Path(f"/proc/{agent.run.pid}/fd").iterdir()))
        resource.prlimit(agent.run.pid, resource.RLIMIT_NOFILE, (used + 3, used + 3))
        clients = [agent.connect() for _ in range(10)]
        for client in clients:
            client.sendall(b"GET")  # none of them is idle, so none makes room
        agent.await_log("accept: ")
        before = processor_seconds(agent)
        time.sleep(1)
        assert processor_seconds(agent) - before < 0.2
        for client in clients:
            client.close()
        assert agent.get("/health").status == 200


def processor_seconds(agent: Agent) -> float:
    """Return the processor time that the agent has used."""
    fields = Path(f"/proc/{agent.run.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_log_file_is_appended_to(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """LOG_FILE keeps what earlier runs wrote and takes the place of stderr."""
    log = tmp_path / "agent.log"
    log.write_text("earlier\n")
    with running_agent(interpreter, program, tmp_path, config=f"LOG_FILE={log}\n") as agent:
        agent.get("/health")
    assert log.read_text().startswith("earlier\n")
    assert "listening on" in log.read_text()
    assert "listening on" not in agent.log_text()


def test_the_log_file_rotates(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """A log file of a mebibyte becomes FILE.1 and a new one is begun."""
    log = tmp_path / "agent.log"
    log.write_text("x" * (1024 * 1024))
    with running_agent(interpreter, program, tmp_path, arguments=["--log-file", str(log)]) as agent:
        agent.get("/health")
    assert (tmp_path / "agent.log.1").stat().st_size == 1024 * 1024
    assert "listening on" in log.read_text()
    assert log.stat().st_size < 10000


def test_an_unwritable_log_file_is_survived(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """When the log file cannot be opened the log goes on to stderr and says why."""
    arguments = ["--log-file", str(tmp_path / "no" / "folder")]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        assert agent.get("/health").status == 200
        assert agent.log_text().count("cannot open log file") == 1
        assert "listening on" in agent.log_text()


@pytest.mark.parametrize("interpreter", list(find_cpythons()), indirect=True)
def test_root_becomes_the_user_it_is_told_to_be(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """--user: settings that only root may read count, and nothing of root is left afterwards."""
    require_root()
    log = tmp_path / "agent.log"
    arguments = ["--user", "nobody", "--log-file", str(log)]
    secret = tmp_path / "agent.conf"
    secret.touch(mode=0o600)
    with running_agent(
        *(interpreter, program, tmp_path), config="VM_ID=kept\n", arguments=arguments
    ) as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "kept"
        assert isinstance(json.loads(agent.get("/metrics").body)["memory_total_kb"], int)
        status = Path(f"/proc/{agent.run.pid}/status").read_text()
        assert re.search(r"(?m)^Uid:\t65534\t65534\t65534\t65534$", status)
        assert re.search(r"(?m)^Groups:\s*$", status)
        assert re.search(r"(?m)^CapEff:\t0+$", status)
    assert log.stat().st_uid == 65534
    assert "Traceback" not in agent.log_text()


def test_without_the_right_to_change_it_stays_who_it_is(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """--user where it cannot be followed for want of root is not a failure."""
    require(os.geteuid() != 0, "root can become another user", optional=True)
    with running_agent(interpreter, program, tmp_path, arguments=["--user", "nobody"]) as agent:
        assert agent.get("/health").status == 200
