"""The os, signal and fcntl modules of the runtime behave as CPython's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require_root

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.conftest import RunRuntime

SCRIPTS = {
    "files": """
path = sys.argv[1] + "/file"
d = os.open(path, os.O_WRONLY | 0o100, 0o640)
print(os.write(d, b"content"))
os.close(d)
print(oct(os.stat(path)[0]), os.stat(path)[6])
os.chmod(path, 0o600)
print(oct(os.stat(path)[0]))
os.symlink("file", sys.argv[1] + "/link")
print(os.readlink(sys.argv[1] + "/link"))
print(os.umask(0o27), os.umask(0o22))
""",
    "errors": """
for call in (
    lambda: os.open("/nonexistent", 0),
    lambda: os.readlink("/"),
    lambda: os.kill(99999999, 0),
    lambda: os.close(999),
    lambda: os.waitpid(-1, 0),
    lambda: os.statvfs("/nonexistent"),
    lambda: os.execvpe("/nonexistent", ["x"], {}),
):
    try:
        call()
    except OSError as error:
        print(error.args[0])
print(os.strerror(2))
""",
    "children": """
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os.dup2(write, 1)
    os.closerange(3, 100)
    os.execvpe("sh", ["sh", "-c", "echo $A $B $0 $#; exit 5", "name", "x"],
               {"A": "1", "B": "two words", "PATH": os.environ["PATH"]})
os.close(write)
print(os.read(read, 100), os.read(read, 100))
found, status = os.waitpid(pid, 0)
print(found == pid, os.WIFEXITED(status), os.WEXITSTATUS(status))
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    time.sleep(60)
    os._exit(0)
print(os.waitpid(pid, os.WNOHANG))
while True:
    try:
        os.killpg(pid, signal.SIGKILL)
        break
    except OSError:
        time.sleep(0.01)
found, status = os.waitpid(pid, 0)
print(os.WIFEXITED(status), status)
pid = os.fork()
if pid == 0:
    os._exit(3)
print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))
""",
    "descriptors": """
read, write = os.pipe()
print(fcntl.fcntl(read, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
fcntl.fcntl(read, fcntl.F_SETFD, 0)
print(fcntl.fcntl(read, fcntl.F_GETFD))
fcntl.fcntl(read, fcntl.F_SETFL, fcntl.fcntl(read, fcntl.F_GETFL) | os.O_NONBLOCK)
try:
    os.read(read, 1)
except OSError as error:
    print(error.args[0])
os.close(write)
print(os.read(read, 1))
""",
    "signals": """
read, write = os.pipe()
fcntl.fcntl(write, fcntl.F_SETFL, fcntl.fcntl(write, fcntl.F_GETFL) | os.O_NONBLOCK)
print(signal.set_wakeup_fd(write))
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, lambda number, frame: None)
    os.kill(os.getpid(), number)
    print(number, list(os.read(read, 10)))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.kill(os.getpid(), signal.SIGHUP)
poll = select.poll()
poll.register(read, select.POLLIN)
print(poll.poll(50))
print(signal.set_wakeup_fd(-1) == write)
for _ in range(3):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
""",
    "environment": """
print(os.getenv("LONG"), os.getenv("NONE"), os.environ["LONG"] == os.getenv("LONG"))
print(sorted(name for name in os.environ if name in ("LONG", "PATH", "EMPTY")))
print(repr(os.environ["EMPTY"]), os.getuid() == os.geteuid())
""",
    "sizes": """
found = os.statvfs(sys.argv[1])
print(found[0], found[1], found[2], found[5], found[9])
print(os.stat("/proc/self")[1] > 0, os.getpid() == int(os.readlink("/proc/self")))
""",
}
HEAD = "import fcntl, os, select, signal, sys, time\n"


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_the_same_as_cpython(name: str, run_runtime: RunRuntime, tmp_path: Path) -> None:
    """Results and error numbers equal those of the Python that runs the tests."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + SCRIPTS[name])
    environment = {"PATH": os.environ["PATH"], "LONG": "x" * 5000, "EMPTY": ""}
    outputs = []
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        folder.mkdir()
        if folder.name == "ours":
            done = run_runtime(script, folder, env=environment)
        else:
            done = subprocess.run(
                [sys.executable, script, folder],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                text=True,
                timeout=60,
                env=environment,
            )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
    assert outputs[0]
    assert outputs[0] == outputs[1]


def test_root_becomes_another_user_for_good(run_runtime: RunRuntime) -> None:
    """Dropping privileges is permanent, with ids beyond 31 bits too."""
    require_root()
    code = (
        "import os\nos.setgroups([4294967294, 7])\nos.setgid(4000000000)\nos.setuid(4000000001)\n"
        "print(open('/proc/self/status').read())\n"
        "try:\n  os.setuid(0)\nexcept OSError as error:\n  print('refused', error.errno)\n"
    )
    done = run_runtime("-c", code)
    assert "Uid:\t4000000001\t4000000001\t4000000001\t4000000001\n" in done.stdout
    assert "Gid:\t4000000000\t4000000000\t4000000000\t4000000000\n" in done.stdout
    assert "Groups:\t7 4294967294" in done.stdout
    assert done.stdout.endswith("refused 1\n")


def test_a_closed_pipe_is_an_error_and_no_end(run_runtime: RunRuntime) -> None:
    """SIGPIPE is ignored, as in CPython."""
    code = "import os\nr, w = os.pipe()\nos.close(r)\ntry:\n  os.write(w, b'x')\n"
    done = run_runtime("-c", code + "except OSError as error:\n  print(error.errno)\n")
    assert done.stdout == "32\n"
