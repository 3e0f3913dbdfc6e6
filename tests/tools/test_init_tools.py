"""OpenRC, insserv, runit and s6 accept their service files and run the real agent with them.

Nix and Guile can read what NixOS and Guix would read.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require
from tests.trees import Program, make_tree
from vmprovision.changes.operations import Symlink, WriteFile
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.guest.configuration import parse_configuration
from vmprovision.initsystem import definition_of
from vmprovision.initsystem.rendering import Service, render
from vmprovision.inspection.pid1 import find_pid1

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tools.conftest import ToolsRoot
    from vmprovision.changes.operations import Operation

# The agent's own words on what runs it; python3-minimal has no urllib.
ASK = """\
ask() {
    python3 -S -E -s -c '
import socket, sys, time
for attempt in range(300):
    try:
        with socket.create_connection(("127.0.0.1", PORT), 5) as sock:
            sock.sendall(b"GET /info HTTP/1.0\\r\\n\\r\\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        break
    except OSError:
        time.sleep(0.1)
else:
    sys.exit("the agent does not answer")
print(answer.split(b"\\r\\n\\r\\n", 1)[1].decode())
'
}
# the numbers of processes whose command line has this in it
numbers() {
    for folder in /proc/[0-9]*; do
        tr '\\0' ' ' <"$folder/cmdline" 2>/dev/null | grep -q -- "$1" && echo "${folder#/proc/}"
    done
}
gone() {
    for attempt in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        [ -n "$(numbers '/usr/local/bin/guest-agent --user')" ] || return 0
        sleep 1
    done
    return 1
}
"""
# asked twice, its process killed in between: its supervisor starts it again
ASK_TWICE = """\
echo "first $(ask)"
kill -KILL $(numbers 'python3 .*guest-agent --user')
echo "second $(ask)"
"""


def operations(init: str, dialect: str) -> list[Operation]:
    """Return the operations for a guest with this init system."""
    definition = definition_of(init)
    (verdict,) = [each for each in definition.without_guest() if each.dialect == dialect]
    return definition.service_operations(Service(), verdict)


@pytest.fixture
def port(tools: ToolsRoot) -> int:
    """Return a free port of this host, and set it in the agent's settings."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number = int(sock.getsockname()[1])
    tools.write("/etc/guest-agent.conf", f"PORT={number}\nLISTEN=127.0.0.1\n".encode())
    return number


def put(tools: ToolsRoot, found: list[Operation]) -> None:
    """Write the operations' files and links into the root."""
    for operation in found:
        if isinstance(operation, WriteFile):
            tools.write(str(operation.path), operation.content, operation.mode)
        elif isinstance(operation, Symlink):
            target = tools.root / str(operation.path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(operation.target)


def answer_after(done: subprocess.CompletedProcess[str], word: str) -> dict[str, Any]:
    """Return the agent's answer in the line that begins with a word."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{word} ")]
    assert len(lines) == 1, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(lines[0].partition(" ")[2])
    return found


def check_respawned(done: subprocess.CompletedProcess[str], parent: str) -> None:
    """Check that the second agent is another process, not root's, with the same parent."""
    first, second = (answer_after(done, word)["init"] for word in ("first", "second"))
    assert first["pid"] != second["pid"]
    for answer in (first, second):
        assert answer["parent"]["comm"].startswith(parent)
        assert answer["pid1_exe"] is None  # root could read it


@pytest.mark.parametrize(
    ("dialect", "parent"), [("supervise-daemon", "supervise-daem"), ("openrc-run", "sh")]
)
def test_openrc_runs_the_service(dialect: str, parent: str, tools: ToolsRoot, port: int) -> None:
    """OpenRC's parser reads the script; rc-service starts, supervises, reports on and stops it."""
    put(tools, operations("openrc", dialect))
    done = tools.run(
        ASK.replace("PORT", str(port))
        + """\
# what OpenRC makes at boot
for state in exclusive starting started stopping inactive failed daemons options; do
    mkdir -p "/run/openrc/$state"
done
touch /run/openrc/softlevel
/etc/init.d/guest-agent describe 2>&1 | sed 's/^/described /'
/etc/init.d/guest-agent --nodeps start || exit 1
"""
        + ASK_TWICE
        + """\
rc-service guest-agent status && echo status $?
/etc/init.d/guest-agent status && echo status $?
/etc/init.d/guest-agent --nodeps stop && gone && echo stopped
rc-service guest-agent status || echo status $?
"""
    )
    assert f"described  * {Service().description}" in done.stdout
    check_respawned(done, parent)
    assert "stopped" in done.stdout.splitlines()
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status ")]
    assert statuses == ["status 0", "status 0", "status 3"]


def test_runit_runs_the_service(tools: ToolsRoot, port: int) -> None:
    """Runsvdir finds the service by the link in its runlevel; sv reports on it and stops it."""
    put(tools, operations("runit", "usual"))
    done = tools.run(
        ASK.replace("PORT", str(port))
        + "mkdir -p /run/runit\nexport SVDIR=/etc/runit/runsvdir/default\nrunsvdir $SVDIR &\n"
        + ASK_TWICE
        + "sv status guest-agent\nsv -w 15 stop guest-agent && gone && echo stopped\n"
        + "sv status guest-agent\n"
    )
    check_respawned(done, "runsv")
    assert "run: guest-agent: (pid " in done.stdout
    assert "stopped" in done.stdout.splitlines()
    assert "down: guest-agent: " in done.stdout


def test_s6_runs_the_service(tools: ToolsRoot, port: int) -> None:
    """s6-svscan starts the agent from its service directory; s6-svc stops it."""
    (run,) = operations("s6", "scandir")
    assert isinstance(run, WriteFile)
    tools.write("/run/service/guest-agent/run", run.content, run.mode)
    done = tools.run(
        ASK.replace("PORT", str(port))
        + "s6-svscan /run/service &\n"
        + ASK_TWICE
        + "s6-svstat /run/service/guest-agent\n"
        + "s6-svc -wD -T 15000 -d /run/service/guest-agent && gone && echo stopped\n"
    )
    check_respawned(done, "s6-supervise")
    assert "up (pid " in done.stdout
    assert "stopped" in done.stdout.splitlines()


def test_insserv_enables_the_script_as_we_do(tools: ToolsRoot) -> None:
    """Insserv accepts the header without a warning and makes links in the same runlevels."""
    found = operations("sysv", "debian")
    put(tools, found[:1])
    done = tools.run("insserv -v /etc/init.d/guest-agent; echo status $?\nls -d /etc/rc?.d/*")
    assert "status 0" in done.stdout.splitlines()
    assert "warning" not in (done.stdout + done.stderr).lower()
    made = {line[:10] for line in done.stdout.splitlines() if line.endswith("guest-agent")}
    ours = {str(o.path)[:10] for o in found if isinstance(o, Symlink)}
    assert made == ours  # /etc/rcN.d/ and whether it is S or K
    for name in (".depend.start", ".depend.stop"):
        first = (tools.root / "etc/init.d" / name).read_text().splitlines()[0]
        assert "guest-agent" in first.split()


@pytest.mark.parametrize(
    ("init", "dialect"),
    [
        ("sysv", "debian"),
        ("openrc", "supervise-daemon"),
        ("openrc", "runscript"),
        ("runit", "usual"),
        ("s6", "scandir"),
        ("procd", ""),
    ],
)
def test_there_are_no_bashisms(init: str, dialect: str, tmp_path: Path) -> None:
    """Checkbashisms finds nothing but POSIX, down to options of builtins."""
    require(shutil.which("checkbashisms"), "checkbashisms (devscripts) is not installed")
    first = operations(init, dialect)[0]
    assert isinstance(first, WriteFile)
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\n" + first.content.partition(b"\n")[2])
    done = subprocess.run(
        ["checkbashisms", "--posix", script],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "program"),
    [
        ("bin/busybox", "busybox"),
        ("lib/runit/runit-init", "runit"),
        ("lib/systemd/systemd", "systemd"),
        ("sbin/finit", "finit"),
        ("sbin/init", "sysvinit"),
        ("sbin/openrc-init", "openrc-init"),
    ],
)
def test_the_real_programs_are_known_by_their_words(
    path: str, program: str, tools: ToolsRoot, tmp_path: Path
) -> None:
    """Each init is recognised as a plain /sbin/init, without a telling name, package or link."""
    content = (tools.root / path).read_bytes()
    make_tree(tmp_path, {"/sbin/init": Program(content)})
    found = find_pid1(LocalFilesystem(tmp_path))
    assert (found.program, found.is_seen) == (program, True)


def generated(template: str) -> bytes:
    """Return what such a guest's own configuration includes."""
    settings = parse_configuration(b"PORT=80\nVM_ID=web-1\nMANAGER_URL=http://192.0.2.1:3000\n")
    return render(template, service=Service(port=80), settings=settings)


def test_nix_evaluates_the_module(tools: ToolsRoot) -> None:
    """With a set of packages given, the module evaluates to the unit, the settings and the port."""
    tools.write("/root/module/guest-agent.nix", generated("nixos/guest-agent.nix.j2"))
    tools.write("/root/module/guest-agent", b"the agent")
    packages = '{ python3 = "/python"; iproute2 = "/iproute2"; }'
    done = tools.run(
        "nix-instantiate --store dummy:// --eval --strict --json "
        f"-E '(import /root/module/guest-agent.nix) {{ pkgs = {packages}; }}'"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    unit = found["systemd"]["services"]["guest-agent"]
    assert unit["wantedBy"] == ["multi-user.target"]
    service = unit["serviceConfig"]
    assert service["ExecStart"].startswith("/python/bin/python3 -S -E -s /nix/store/")
    assert service["DynamicUser"] is True
    assert service["CapabilityBoundingSet"] == "CAP_NET_BIND_SERVICE"
    settings = found["environment"]["etc"]["guest-agent.conf"]["text"]
    assert settings == "PORT=80\nVM_ID=web-1\nMANAGER_URL=http://192.0.2.1:3000\n"
    assert found["networking"]["firewall"]["allowedTCPPorts"] == [80]


def test_guile_reads_the_shepherd_service(tools: ToolsRoot) -> None:
    """Guile's reader, with Guix's two signs for G-expressions, finds three complete forms."""
    tools.write("/root/guest-agent.scm", generated("guix/guest-agent.scm.j2"))
    reader = """
(define (sign name) (lambda (char port) (list name (read port))))
(read-hash-extend #\\\\~ (sign 'gexp))
(read-hash-extend #\\\\$ (sign 'ungexp))
(call-with-input-file "/root/guest-agent.scm"
  (lambda (port)
    (let loop ((form (read port)))
      (unless (eof-object? form) (write form) (newline) (loop (read port))))))
""".replace("\\\\", "\\")
    tools.write("/root/read.scm", reader.encode())
    done = tools.run("guile-3.0 --no-auto-compile -s /root/read.scm")
    assert (done.returncode, done.stderr) == (0, "")
    modules, settings, service = done.stdout.splitlines()
    assert modules.startswith("(use-modules (gnu packages python)")
    assert '"PORT=80\\nVM_ID=web-1\\nMANAGER_URL=http://192.0.2.1:3000\\n"' in settings
    assert "(provision (quote (guest-agent)))" in service
    assert '"--user" "nobody"' in service
