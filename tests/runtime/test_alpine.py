"""Inject the agent into real Alpine trees, which have no Python, and run it in them."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.agent.agents import Agent, await_answer, free_port, stop
from tests.conftest import require
from tests.trees import require_root_filesystem

if TYPE_CHECKING:
    from collections.abc import Iterator

TREES = {
    "3.2": "alpine-3.2-openrc.tar.xz",
    "3.8": "alpine-minirootfs-3.8.5-x86_64.tar.gz",
    "3.20": "alpine-minirootfs-3.20.3-x86_64.tar.gz",
}
# In a user namespace any user may change the root; /proc is the host's.
INSIDE = 'mount --rbind /proc "$0/proc" && exec chroot "$0" /usr/local/bin/guest-agent "$@"'


@pytest.fixture(params=list(TREES))
def alpine(request: pytest.FixtureRequest, runtime: Path, tmp_path: Path) -> Path:
    """A root filesystem of Alpine."""
    assert runtime.exists()
    tarball = require_root_filesystem(TREES[request.param])
    root = tmp_path / "alpine"
    root.mkdir()
    options = ["--no-same-owner", "--exclude=./dev/*", "--exclude=dev/*"]
    subprocess.run(["tar", "-C", root, *options, "-xf", tarball], check=True)
    return root


@contextmanager
def agent_inside(root: Path, *arguments: str) -> Iterator[Agent]:
    """Run the agent of a tree with that tree as its root."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    tried = subprocess.run([*unshare, "true"], check=False, capture_output=True, text=True)
    require(tried.returncode == 0, f"no user namespaces here: {tried.stderr.strip()}")
    port = free_port()
    argv = [*unshare, "sh", "-c", INSIDE, str(root), "--listen", "127.0.0.1", "--port", str(port)]
    log = root.with_name("stderr")
    (root / "proc").mkdir(exist_ok=True)
    with log.open("wb") as stderr:
        run = subprocess.Popen([*argv, *arguments], stdin=subprocess.DEVNULL, stderr=stderr)
    agent = Agent(port=port, log=log, run=run, started=0.0)
    try:
        await_answer(agent)
        yield agent
    finally:
        stop(run)


def test_the_agent_runs_inside(alpine: Path) -> None:
    """The injected agent answers from inside the tree in less than 2.5 MB, and stops cleanly."""
    report = vmprovision.inject(alpine, vmprovision.InjectOptions(vm_id="alpine-1"))
    assert "bundled MicroPython" in " ".join(report.notes)
    assert vmprovision.verify(alpine).mismatches == ()
    with agent_inside(alpine) as agent:
        assert json.loads(agent.get("/health").body)["status"] == "healthy"
        metrics = json.loads(agent.get("/metrics").body)
        assert metrics["memory_total_kb"] > 0
        assert isinstance(metrics["uptime_seconds"], int)
        info = json.loads(agent.get("/info").body)
        assert (info["vm_id"], info["runtime"]) == ("alpine-1", "MicroPython 1.25.0")
        status = Path(f"/proc/{agent.run.pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0])
        assert resident < 2560
        agent.run.terminate()
        assert agent.run.wait(3) == 0


def test_the_guest_is_as_it_was(alpine: Path) -> None:
    """Removing the agent takes the runtime with it."""
    vmprovision.inject(alpine)
    assert shutil.which("guest-agent", path=str(alpine / "usr/local/bin"))
    vmprovision.remove(alpine)
    assert not list(alpine.glob("usr/local/*/guest-agent*"))
