"""Real boots of the two recipe images, and the ways in which a machine can end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.agent.interpreters import MICROPYTHON, get_interpreter
from tests.conftest import require
from vmprovision.appliance.session import Appliance, Drive, open_appliance
from vmprovision.errors import CancelledError, ProofError, UnsupportedGuestError
from vmprovision.progress import Control
from vmprovision.proof.machine import (
    BootSource,
    Machine,
    boot,
    wait_for_http,
)
from vmprovision.proof.report_listener import ReportListener
from vmprovision.recipe import build_image, find_recipe

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

pytestmark = pytest.mark.boot

BOOT_SECONDS = 240.0
REPORTS = 3

# What the agent does on the wire, and GET /reach/PORT: can the guest reach the host behind
# its gateway? It runs on CPython and on the runtime.
RESPONDER = b"""\
import socket, time

def connect(host, port, seconds):
    peer = socket.socket()
    peer.settimeout(seconds)
    peer.connect(socket.getaddrinfo(host, port)[0][-1])
    return peer

def report(number):
    body = '{"guest_ip": "10.0.2.15", "number": %d}' % number
    head = 'POST /v1/vms/test/guest-ip HTTP/1.0\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(body)
    peer = connect('10.0.2.100', 8081, 5)
    peer.send((head + body).encode())
    answer = peer.recv(1000)
    peer.close()
    return b' 200 ' in answer

def reached(port):
    try:
        connect('10.0.2.2', port, 1).close()
        return 'true'
    except OSError:
        return 'false'

server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(socket.getaddrinfo('0.0.0.0', 8080)[0][-1])
server.listen(5)
for number in range(3):
    while True:
        try:
            if report(number):
                break
        except OSError:
            pass
        time.sleep(0.5)
while True:
    peer, _ = server.accept()
    path = peer.recv(4000).split()[1].decode()
    answer = reached(int(path.split('/')[2])) if path.startswith('/reach/') else 'null'
    peer.send(('HTTP/1.0 200 OK\\r\\n\\r\\n{"reached": %s}' % answer).encode())
    peer.close()
"""
UNIT = b"""\
[Unit]
Description=test responder
[Service]
ExecStart=/usr/bin/python3 -S -E -s /opt/responder.py
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A disk with the responder on it, and how to boot it."""

    disk: Path
    source: BootSource


def overlay(backing: Path, path: Path) -> Path:
    """Make a qcow2 overlay over an image; return its path."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*command, str(backing), str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Return the bootable Debian image with the responder as a unit."""
    disk = overlay(recipe_image("debian-12-systemd"), tmp_path_factory.mktemp("debian") / "d.qcow2")
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        assert appliance.call("filesize", "/etc/machine-id") == 0
        appliance.call("write", "/opt/responder.py", RESPONDER)
        unit = "/etc/systemd/system/responder.service"
        appliance.call("write", unit, UNIT)
        wanted = "/etc/systemd/system/multi-user.target.wants"
        appliance.call("mkdir_p", wanted)
        appliance.call("ln_s", unit, f"{wanted}/responder.service")
    return Guest(disk=disk, source=BootSource())


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Return the BusyBox image with the responder in inittab, and its kernel beside it."""
    folder = tmp_path_factory.mktemp("busybox")
    disk = overlay(recipe_image("busybox-standalone"), folder / "disk.qcow2")
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda", "/")
        assert not appliance.call("exists", "/etc/machine-id")
        appliance.call("mkdir_p", "/opt")
        appliance.call("write", "/opt/responder.py", RESPONDER)
        # no Python: the runtime runs the same script
        appliance.call("upload", get_interpreter(MICROPYTHON).argv[0], "/opt/python")
        appliance.call("chmod", 0o755, "/opt/python")
        line = b"::respawn:/opt/python /opt/responder.py\n"
        appliance.call("write_append", "/etc/inittab", line)
        kernel = download(appliance, "/boot/vmlinuz-*", folder / "kernel")
        initrd = download(appliance, "/boot/initrd.img-*", folder / "initrd")
    command_line = find_recipe("busybox-standalone").disk.command_line
    source = BootSource(kernel=kernel, initrd=initrd, command_line=command_line)
    return Guest(disk=disk, source=source)


def recipe_image(name: str) -> Path:
    """Return the image of a recipe, built if the cache does not have it."""
    for program in ("mmdebstrap", "qemu-system-x86_64"):
        require(shutil.which(program), f"{program} is not installed")
    return build_image(name, control=Control())


def download(appliance: Appliance, pattern: str, target: Path) -> Path:
    """Download the one guest file that matches a pattern; return the target."""
    (found,) = appliance.call("glob_expand", pattern)
    appliance.call("download", found, str(target))
    return target


@pytest.fixture
def listener() -> Iterator[ReportListener]:
    """Return the manager's side, on loopback."""
    with ReportListener() as opened:
        yield opened


def qemu_processes(disk: Path) -> list[int]:
    """Return the processes, QEMU or its supervisor, whose command line names the disk."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(disk).encode() in words and b"qemu-system" in words:
                found.append(int(entry.name))
    return found


def listening_addresses() -> set[str]:
    """Return ``ADDRESS:PORT`` of all listening TCP sockets, as /proc/net/tcp writes them."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    lines += Path("/proc/net/tcp6").read_text(encoding="ascii").splitlines()[1:]
    return {line.split()[1] for line in lines if line.split()[3] == "0A"}


@pytest.mark.parametrize("name", ["debian", "busybox"])
def test_a_guest_boots_answers_and_reports(
    name: str, request: pytest.FixtureRequest, listener: ReportListener, tmp_path: Path
) -> None:
    """The agent's port answers, every report arrives, and the guest reaches nothing else."""
    guest: Guest = request.getfixturevalue(name)
    disk = overlay(guest.disk, tmp_path / "throwaway, with a comma.qcow2")
    log = tmp_path / "console.log"
    begun = time.monotonic()
    with boot(
        Drive(path=disk, format="qcow2"),
        source=guest.source,
        agent_port=8080,
        manager=listener.address,
        control=Control(),
        console_log=log,
    ) as machine:
        deadline = begun + BOOT_SECONDS
        url = f"{machine.agent_url}/health"
        assert wait_for_http(url, deadline, machine) == {"reached": None}
        reports = listener.wait_for_reports(REPORTS, deadline=deadline, check=machine.check)
        assert [report.body["number"] for report in reports] == list(range(REPORTS))
        assert {report.path for report in reports} == {"/v1/vms/test/guest-ip"}

        port = int(listener.address.split(":")[1])
        answer = wait_for_http(f"{machine.agent_url}/reach/{port}", deadline, machine)
        assert answer == {"reached": False}
        here = f":{int(machine.agent_url.rpartition(':')[2]):04X}"
        forwarded = {address for address in listening_addresses() if address.endswith(here)}
        assert forwarded == {f"0100007F{here}"}

        assert machine.is_running()
        assert machine.exit_reason() == ""
        assert len(machine.console_tail(5)) == 5
        assert qemu_processes(disk)
    assert qemu_processes(disk) == []
    assert not machine.is_running()
    assert log.stat().st_size > 1000


def test_a_panic_is_reported_at_once(
    busybox: Guest, listener: ReportListener, tmp_path: Path
) -> None:
    """A kernel without its initrd panics, and the wait ends before its deadline."""
    source = BootSource(kernel=busybox.source.kernel, command_line="root=/dev/none console=ttyS0")
    disk = overlay(busybox.disk, tmp_path / "disk.qcow2")
    with (
        started(disk, source, listener) as machine,
        pytest.raises(ProofError, match="panicked") as caught,
    ):
        wait_for_http(machine.agent_url, time.monotonic() + BOOT_SECONDS, machine)
    assert any("Kernel panic" in line for line in caught.value.console)


def test_a_guest_that_powers_off_is_reported(
    busybox: Guest, listener: ReportListener, tmp_path: Path
) -> None:
    """The image's initrd powers off when it finds no root, and the error says so."""
    source = BootSource(
        kernel=busybox.source.kernel,
        initrd=busybox.source.initrd,
        command_line="root=/dev/none console=ttyS0",
    )
    disk = overlay(busybox.disk, tmp_path / "disk.qcow2")
    with (
        started(disk, source, listener) as machine,
        pytest.raises(ProofError, match="powered itself off") as caught,
    ):
        wait_for_http(machine.agent_url, time.monotonic() + BOOT_SECONDS, machine)
    assert "cannot mount the root filesystem" in " ".join(caught.value.console)


def test_a_missing_answer_is_reported(listener: ReportListener, tmp_path: Path) -> None:
    """A disk with nothing to boot reaches the deadline of the wait, not the test's."""
    disk = empty_disk(tmp_path)
    with (
        started(disk, BootSource(), listener) as machine,
        pytest.raises(ProofError, match="in time"),
    ):
        wait_for_http(machine.agent_url, time.monotonic() + 2, machine)


def test_cancelling_ends_the_machine(listener: ReportListener, tmp_path: Path) -> None:
    """A caller who cancels regains control at once, and QEMU is gone."""
    disk, control = empty_disk(tmp_path), Control()
    threading.Timer(1.0, control.cancelled.set).start()
    begun = time.monotonic()
    with (
        pytest.raises(CancelledError),
        boot(
            Drive(path=disk, format="qcow2"),
            source=BootSource(),
            agent_port=8080,
            manager=listener.address,
            control=control,
        ) as machine,
    ):
        wait_for_http(machine.agent_url, begun + BOOT_SECONDS, machine)
    assert time.monotonic() - begun < 15
    assert qemu_processes(disk) == []


def test_the_time_limit_ends_the_machine(listener: ReportListener, tmp_path: Path) -> None:
    """QEMU ends even if the caller never looks again."""
    disk = empty_disk(tmp_path)
    with started(disk, BootSource(), listener, seconds=2) as machine:
        await_none(disk, 10)
        assert machine.exit_reason() == "it reached its time limit"


def test_a_disk_that_qemu_refuses_is_reported(listener: ReportListener, tmp_path: Path) -> None:
    """The error quotes QEMU."""
    disk = tmp_path / "not a disk.qcow2"
    disk.write_bytes(b"nothing of the kind")
    with pytest.raises(ProofError, match="qcow2"), started(disk, BootSource(), listener):
        pass
    assert qemu_processes(disk) == []


def test_a_manager_elsewhere_is_refused(tmp_path: Path) -> None:
    """The guest is never connected to anything but loopback."""
    with (
        pytest.raises(ProofError, match="not on loopback"),
        boot(
            Drive(path=empty_disk(tmp_path), format="qcow2"),
            source=BootSource(),
            agent_port=8080,
            manager="192.0.2.1:80",
            control=Control(),
        ),
    ):
        pass


def test_an_architecture_without_a_board_is_refused(
    listener: ReportListener, tmp_path: Path
) -> None:
    """A guest without a known board is unsupported, which is not a failed proof."""
    with (
        pytest.raises(UnsupportedGuestError, match="vax"),
        boot(
            Drive(path=empty_disk(tmp_path), format="qcow2"),
            source=BootSource(),
            agent_port=8080,
            manager=listener.address,
            control=Control(),
            arch="vax",
        ),
    ):
        pass


def test_the_machine_outlives_the_thread_that_started_it(
    listener: ReportListener, tmp_path: Path
) -> None:
    """A pool's thread may end, and PR_SET_PDEATHSIG would end QEMU with it."""
    disk = empty_disk(tmp_path)
    opened = started(disk, BootSource(), listener)
    thread = threading.Thread(target=opened.__enter__)
    thread.start()
    thread.join()
    try:
        time.sleep(1)
        assert qemu_processes(disk)
    finally:
        opened.__exit__(None, None, None)
    assert qemu_processes(disk) == []


@pytest.mark.parametrize("victim", ["caller", "supervisor"])
def test_no_qemu_outlives_a_kill(victim: str, tmp_path: Path) -> None:
    """SIGKILL to the caller, or to the supervisor between it and QEMU, ends QEMU too."""
    disk = empty_disk(tmp_path)
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from vmprovision.appliance.drives import Drive\n"
        "from vmprovision.proof.machine import BootSource, boot\n"
        "from vmprovision.progress import Control\n"
        "disk = Drive(path=Path(sys.argv[1]), format='qcow2')\n"
        "with boot(disk, source=BootSource(), agent_port=8080,\n"
        "          manager='127.0.0.1:9', control=Control(), seconds=60):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", program, str(disk)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "up\n"
        supervisor, qemu = sorted(set(qemu_processes(disk)))
        assert parent_of(qemu) == supervisor
        os.kill(caller.pid if victim == "caller" else supervisor, signal.SIGKILL)
        await_none(disk, 10)
    finally:
        caller.kill()
        caller.wait()
        if caller.stdout:
            caller.stdout.close()


def parent_of(process: int) -> int:
    """Return the parent's process id."""
    stat = Path(f"/proc/{process}/stat").read_bytes()
    return int(stat.rpartition(b")")[2].split()[1])


def empty_disk(folder: Path) -> Path:
    """Make an empty disk; return its path."""
    disk = folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    return disk


def started(
    disk: Path, source: BootSource, listener: ReportListener, seconds: float = BOOT_SECONDS
) -> contextlib.AbstractContextManager[Machine]:
    """Call ``boot`` with the arguments that these tests share."""
    return boot(
        Drive(path=disk, format="qcow2"),
        source=source,
        agent_port=8080,
        manager=listener.address,
        control=Control(),
        seconds=seconds,
    )


def await_none(disk: Path, seconds: float) -> None:
    """Wait until no process names the disk."""
    deadline = time.monotonic() + seconds
    while qemu_processes(disk):
        assert time.monotonic() < deadline
        time.sleep(0.1)
