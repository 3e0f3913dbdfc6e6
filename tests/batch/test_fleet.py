"""Batches on a real Dask cluster: a scheduler and two workers, one of which is killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.batch.cluster import Cluster, cluster_in
from tests.bench.measure import descendants
from tests.conftest import require
from tests.image.test_crashes import OPEN, beside, blocks_of, wait_until
from tests.image.tiny import PATH, tiny_disk
from tests.trees import SYSTEMD_TREE, make_tree
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE
from vmprovision.batch import dask as fleet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.conftest import RunCli

GUESTS = ("vm-1", "vm-2", "vm-3", "vm-4")


@pytest.fixture(autouse=True)
def _dask() -> None:
    """Skip or fail if Dask, an optional dependency, is missing."""
    require(importlib.util.find_spec("distributed"), "distributed is not installed")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler and two workers."""
    with cluster_in(tmp_path / "cluster", workers=2) as cluster:
        yield cluster


def test_the_command_line_on_a_cluster(cluster: Cluster, run_cli: RunCli, tmp_path: Path) -> None:
    """The results are the same as with threads of one process."""
    trees = [make_tree(tmp_path / name, SYSTEMD_TREE) for name in GUESTS]
    words = [*(tree.name for tree in trees), "none.qcow2", "--vm-id", "{name}", "--json"]
    done = run_cli("inject", *words, "--scheduler", cluster.address, check=False, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [result["image"] for result in results] == words[:5]
    assert [result["outcome"] for result in results] == ["injected"] * 4 + ["failed"]
    assert results[4]["error"]["kind"] == "ImageNotFoundError"
    for tree in trees:
        assert f"VM_ID={tree.name}\n" in (tree / "etc/guest-agent.conf").read_text()
    again = json.loads(run_cli("inject", *words[:4], "--json", cwd=tmp_path).stdout)
    local = {**again["results"][0]["report"], "guest": None}
    assert {**results[0]["report"], "guest": None, "changed": []} == local


@pytest.mark.appliance
def test_a_worker_that_is_killed(run_cli: RunCli, tmp_path: Path) -> None:
    """When a worker is killed, its appliance ends and another worker injects the image again."""
    disks = tmp_path / "disks"
    disks.mkdir()
    made = tiny_disk(tmp_path / "tiny.raw", {})
    images = [Path(shutil.copy(made, disks / f"{name}.raw")) for name in GUESTS[:3]]
    with (
        cluster_in(tmp_path / "cluster", workers=1) as cluster,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        victim = cluster.add_worker({STOCK_VARIABLE: "1"})  # slow enough to be met at work
        wait_until(lambda: "Registered to" in cluster.log_of(2))
        words = ("--vm-id", "{name}", "--format", "raw", "--scheduler", cluster.address)
        batch = pool.submit(run_cli, "inject", *images, *words, "--json", check=False)
        wait_until(lambda: batch.done() or machines_of(victim.pid, images))
        ((machine, image),) = machines_of(victim.pid, images)
        redo_log = beside(image, OPEN)
        before = blocks_of(redo_log)
        wait_until(lambda: batch.done() or blocks_of(redo_log) > before)
        below = list(descendants(victim.pid))
        assert machine in below
        victim.kill()
        victim.wait()
        wait_until(lambda: not any(map(is_alive, below)), 15)
        done = batch.result()
        survivor = cluster.log_of(1)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)["results"]
    assert [result["outcome"] for result in results] == ["injected"] * 3
    assert f"{image}: throwing away the unfinished redo log" in survivor
    assert sorted(disks.iterdir()) == images, "something is left beside the images"
    for path in images:
        assert f"VM_ID={path.stem}\n" in guest_file(path, "/etc/guest-agent.conf")


@pytest.mark.appliance
@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_merges(tmp_path: Path) -> None:
    """The next worker waits for the qemu-img of a worker that was killed while merging."""
    image = tiny_disk(tmp_path / "disk.raw", {})
    real, mark = shutil.which("qemu-img"), tmp_path / "merging"
    slow = tmp_path / "bin" / "qemu-img"
    slow.parent.mkdir()
    slow.write_text(
        "#!/bin/sh\n"
        f'case $1 in commit) mkdir {mark} 2>/dev/null && sleep 6 ;; esac\nexec {real} "$@"\n'
    )
    slow.chmod(0o755)
    path = {"PATH": f"{slow.parent}:{os.environ['PATH']}"}
    with cluster_in(tmp_path / "cluster", workers=0) as cluster:
        victim = cluster.add_worker(path)
        with (
            concurrent.futures.ThreadPoolExecutor(1) as pool,
            vmprovision.connect_scheduler(cluster.address) as executor,
        ):
            source = vmprovision.ImageOptions(format="raw")
            batch = pool.submit(vmprovision.inject_many, [image], source=source, executor=executor)
            wait_until(lambda: batch.done() or mark.exists())
            cluster.add_worker(path)
            victim.kill()
            victim.wait()
            (result,) = batch.result().results
        assert result.outcome == "unchanged", result.error
        assert f"{image}: completing an interrupted injection" in cluster.log_of(2)
    assert sorted(tmp_path.glob("disk*")) == [image]
    assert "PORT=8080" in guest_file(image, "/etc/guest-agent.conf")


def test_a_scheduler_that_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    """If the scheduler is lost, its images fail and the batch ends."""
    trees = [make_tree(tmp_path / name, SYSTEMD_TREE) for name in GUESTS]
    with vmprovision.connect_scheduler(cluster.address) as executor:
        assert vmprovision.inject_many(trees[:1], executor=executor).ok
        blocked = [executor.submit(time.sleep, 600) for _ in range(2)]
        threading.Timer(1, cluster.scheduler.kill).start()
        report = vmprovision.inject_many(trees[1:], executor=executor)
    assert all(isinstance(result.error, vmprovision.FleetError) for result in report.results)
    assert len(report.results) == 3
    assert all(future.cancelled() for future in blocked)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, tmp_path: Path) -> None:
    """Without a scheduler, workers or Dask there is one error with a next step."""
    monkeypatch.setattr(fleet, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(fleet, "WORKER_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with (
        pytest.raises(vmprovision.FleetError, match=f"answers at tcp://127.0.0.1:{port}"),
        vmprovision.connect_scheduler(f"tcp://127.0.0.1:{port}"),
    ):
        pass
    with (
        cluster_in(tmp_path / "cluster", workers=0) as cluster,
        pytest.raises(vmprovision.FleetError, match="no workers"),
        vmprovision.connect_scheduler(cluster.address),
    ):
        pass
    tree = make_tree(tmp_path / "tree", SYSTEMD_TREE)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "distributed.py").write_text("raise ImportError\n")
    environment = {"PYTHONPATH": str(tmp_path / "hidden")}
    words = ("inject", tree, "--scheduler", "tcp://127.0.0.1:9")
    done = run_cli(*words, check=False, env=environment)
    assert done.returncode == 90
    assert "vmprovision[fleet]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_with_another_agent(tmp_path: Path) -> None:
    """A worker that would inject another agent is refused before any work."""
    other = tmp_path / "other"
    shutil.copytree(Path(vmprovision.__file__).parent, other / "vmprovision")
    module = other / "vmprovision" / "agent" / "main.py"
    module.write_text(module.read_text() + "\nOTHER = 1\n")
    (other / "templates").symlink_to(Path(vmprovision.__file__).parents[1] / "templates")
    with cluster_in(tmp_path / "cluster", workers=1) as cluster:
        cluster.add_worker({"PYTHONPATH": str(other)})
        wait_until(lambda: "Registered to" in cluster.log_of(2))
        with (
            pytest.raises(vmprovision.FleetError, match=r"would inject agent .*, this host agent"),
            vmprovision.connect_scheduler(cluster.address),
        ):
            pass


def test_a_worker_that_cannot_work(cluster: Cluster) -> None:
    """A worker whose host cannot do the work is refused: it would quickly fail many images."""
    cluster.add_worker({"LIBGUESTFS_HV": "/nonexistent/qemu"})
    wait_until(lambda: "Registered to" in cluster.log_of(3))
    with (
        pytest.raises(vmprovision.FleetError, match=r"cannot do the work: .*/nonexistent/qemu"),
        vmprovision.connect_scheduler(cluster.address),
    ):
        pass


def test_versions_that_do_not_match() -> None:
    """The error names the process that differs, and its version."""
    same = {"packages": {"vmprovision": "1", "distributed": "2"}}
    for kind, package, there in (
        ("scheduler", "vmprovision", None),
        ("tcp://192.0.2.2:1", "distributed", "3"),
    ):
        other = {"packages": {**same["packages"], package: there}}
        versions = {"client": same, "scheduler": same, "workers": {"tcp://192.0.2.1:1": same}}
        if kind == "scheduler":
            versions["scheduler"] = other
        else:
            versions["workers"] = {"tcp://192.0.2.1:1": same, kind: other}
        with pytest.raises(vmprovision.FleetError) as refused:
            fleet._require_same_versions(versions)  # noqa: SLF001 -- no cluster has such versions here
        assert f"{kind} has {package} {there or 'not installed'}" in refused.value.message


def machines_of(process: int, images: Sequence[Path]) -> list[tuple[int, Path]]:
    """Return the QEMU processes below a process that have the redo log of one image open."""
    redo_logs = {str(beside(image, OPEN)): image for image in images}
    found = []
    for below in descendants(process):
        with contextlib.suppress(OSError):
            if b"(qemu-system" in Path(f"/proc/{below}/stat").read_bytes():
                files = {str(entry.readlink()) for entry in Path(f"/proc/{below}/fd").iterdir()}
                found += [(below, redo_logs[file]) for file in files & redo_logs.keys()]
    return found


def is_alive(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] != b"Z"


def guest_file(image: Path, path: str) -> str:
    """Return a file of an unpartitioned ext4 filesystem, read by debugfs(8)."""
    debugfs = shutil.which("debugfs", path=PATH)
    require(debugfs, "debugfs is not installed")
    words = [str(debugfs), "-R", f"cat {path}", str(image)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
