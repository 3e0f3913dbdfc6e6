"""How many workers fit on a host, given the files of /proc and /sys."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vmprovision.host.capacity import UNLIMITED, Capacity, host_capacity

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
MEMINFO = "MemTotal:       24683020 kB\nMemFree:         100 kB\nMemAvailable:    8388608 kB\n"
V1_UNLIMITED = "9223372036854771712\n"


def host(root: Path, files: dict[str, str]) -> Capacity:
    """Return the capacity of a host with these files."""
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return host_capacity(root)


def test_a_host_without_containers(tmp_path: Path) -> None:
    """Without limits, all cores of the affinity and the available memory count."""
    capacity = host(tmp_path, {"proc/self/cgroup": "0::/\n"})
    assert capacity == Capacity(cores=len(os.sched_getaffinity(0)), memory=8 * GIB)
    (tmp_path / "proc/self/cgroup").unlink()
    assert host_capacity(tmp_path) == capacity


def test_a_container_with_version_2(tmp_path: Path) -> None:
    """The tightest group decides; file cache counts as free memory."""
    files = {
        "proc/self/cgroup": "0::/box/inner\n",
        "sys/fs/cgroup/box/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/box/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/box/inner/memory.max": "max\n",
        "sys/fs/cgroup/box/inner/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/box/inner/cpu.max": "max 100000\n",
    }
    assert host(tmp_path, files) == Capacity(cores=1, memory=3 * GIB)


@pytest.mark.parametrize("seen", ["", "docker/0a1b"])
def test_a_container_with_version_1(tmp_path: Path, seen: str) -> None:
    """Limits are found if the path is the host's but the container sees its group as the root."""
    memory, cpu = f"sys/fs/cgroup/memory/{seen}", f"sys/fs/cgroup/cpu,cpuacct/{seen}"
    files = {
        "proc/self/cgroup": "5:memory:/docker/0a1b\n4:cpu,cpuacct:/docker/0a1b\n1:name=systemd:/\n",
        f"{memory}/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{memory}/memory.usage_in_bytes": f"{2 * GIB + 4096}\n",
        f"{memory}/memory.stat": f"total_inactive_file {GIB}\n",
        f"{cpu}/cpu.cfs_quota_us": "50000\n",
        f"{cpu}/cpu.cfs_period_us": "100000\n",
    }
    assert host(tmp_path, files) == Capacity(cores=1, memory=GIB - 4096)


def test_a_group_without_limits(tmp_path: Path) -> None:
    """Version 1 expresses "no limit" by a huge number."""
    files = {
        "proc/self/cgroup": "4:memory:/\n3:cpu:/\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert host(tmp_path, files).memory == 8 * GIB
    assert host(tmp_path, {"proc/meminfo": "MemTotal: 1 kB\n"}).memory == UNLIMITED


def test_workers_by_cores_and_memory() -> None:
    """The scarcer of cores and memory decides; at least one worker runs."""
    assert Capacity(cores=4, memory=8 * GIB).workers(GIB) == 4
    assert Capacity(cores=4, memory=2 * GIB).workers(GIB) == 2
    assert Capacity(cores=4, memory=0).workers(GIB) == 1


def test_this_host() -> None:
    """The real files of this host give at least one core and some memory."""
    capacity = host_capacity()
    assert 1 <= capacity.cores <= (os.cpu_count() or 1)
    assert 64 << 20 < capacity.memory < 1 << 50
