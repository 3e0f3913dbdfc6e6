"""Run the runtimes of other architectures, if they have been built, with qemu-user."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.agent.agents import SOURCE, build_program, running_agent
from tests.agent.interpreters import Interpreter
from tests.agent.test_portable import run_script
from tests.conftest import require
from tests.runtime.test_port import HEAD, SCRIPTS
from vmprovision.guest.names import ARCHITECTURES
from vmprovision.runtime.store import (
    host_architecture,
    list_runtimes,
    load,
)

if TYPE_CHECKING:
    from pathlib import Path

# Most hosts lack these emulators: `nox -s runtimes` builds and runs everything.
pytestmark = pytest.mark.slow

# The oldest processor of each architecture: what runs on it runs on all.
PROCESSORS = {
    "armv7l": ("arm", "arm926"),
    "i386": ("i386", "486"),
    "ppc64le": ("ppc64le", "power8"),
    # QEMU has no z10; it lacks the vectors of z13, and what z196 and zEC12 brought
    "s390x": ("s390x", "max,vx=off,vxeh=off,vxeh2=off,stfle45=off,stfle49=off,stfle53=off"),
}


@pytest.fixture(scope="module", params=[a for a in ARCHITECTURES if a != host_architecture()])
def foreign(request: pytest.FixtureRequest) -> Interpreter:
    """Return the runtime of another architecture, run by qemu-user."""
    built = {runtime.architecture: runtime for runtime in list_runtimes()}
    reason = "not built: `nox -s runtimes` builds and tests the runtimes of all architectures"
    require(request.param in built, reason, optional=True)
    load(built[request.param])
    name, processor = PROCESSORS.get(request.param, (request.param, ""))
    qemu = shutil.which(f"qemu-{name}-static") or shutil.which(f"qemu-{name}")
    require(qemu, f"there is no qemu-{name}: it is in the package qemu-user")
    options = ("-cpu", processor) if processor else ()
    argv = (str(qemu), *options, str(built[request.param].path))
    return Interpreter(name=request.param, argv=argv)


def test_the_agent_answers(foreign: Interpreter, tmp_path: Path) -> None:
    """The agent answers /health, /metrics and /info, and ends cleanly."""
    with running_agent(foreign, build_program(tmp_path), tmp_path / "agent") as agent:
        assert json.loads(agent.get("/health").body)["status"] == "healthy"
        assert json.loads(agent.get("/metrics").body)["memory_total_kb"] > 0
        assert json.loads(agent.get("/info").body)["runtime"] == "MicroPython 1.25.0"
        agent.run.terminate()
        assert agent.run.wait(10) == 0
    assert "Traceback" not in agent.log_text()


def test_results_do_not_depend_on_the_architecture(foreign: Interpreter, tmp_path: Path) -> None:
    """The output equals that of CPython on this host, except for the machine's name."""
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE, tmp_path / "guest_agent", ignore=unwanted)
    expected = run_script((sys.executable, "-S", "-E", "-s"), tmp_path)
    machine = re.compile(r'machine=\\"\w+\\"')
    assert machine.search(expected)
    assert machine.sub("", run_script(foreign.argv, tmp_path)) == machine.sub("", expected)


@pytest.mark.parametrize("name", ["files", "children", "descriptors", "signals", "environment"])
def test_the_kernel_is_asked_rightly(name: str, foreign: Interpreter, tmp_path: Path) -> None:
    """Structures and system call numbers are those of the architecture."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + SCRIPTS[name])
    environment = {"PATH": os.environ["PATH"], "LONG": "x" * 5000, "EMPTY": ""}
    outputs: list[str] = []
    for argv in ((sys.executable,), foreign.argv):
        folder = tmp_path / str(len(outputs))
        folder.mkdir()
        done = subprocess.run(
            [*argv, script, folder],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
            env=environment,
        )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
