"""Find how many cores and how much memory this process may use, in a container too.

Cores come from sched_getaffinity(2) and the control groups' CPU quotas; memory from
``MemAvailable`` of proc(5) and what every control group above this process still
allows.  Control groups have version 2 (the kernel's ``admin-guide/cgroup-v2.rst``) or
version 1, whose files have other names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path("/")
UNLIMITED = 1 << 60  # version 1 expresses "no limit" by a number of this size


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The cores and the memory that this process may use.

    Attributes:
        cores: the number that its affinity and its control groups allow; at least 1.
        memory: free bytes.
    """

    cores: int
    memory: int

    def workers(self, memory: int) -> int:
        """Return how many workers with a core and this much memory each fit; at least 1."""
        return max(1, min(self.cores, self.memory // memory))


def host_capacity(root: Path = ROOT) -> Capacity:
    """Return the cores and the memory that this process may use.

    Args:
        root: the directory that contains ``/proc`` and ``/sys``.
    """
    groups = list(_control_groups(root))
    cores = [len(os.sched_getaffinity(0)), *(c for g in groups if (c := _quota(g)) is not None)]
    memory = [_available(root), *(m for g in groups if (m := _allowance(g)) is not None)]
    return Capacity(cores=max(1, min(cores)), memory=max(0, min(memory)))


def _available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text("ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return UNLIMITED  # older than Linux 3.14


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of the groups above them.

    In a container the path may exist on the host only; the container's own groups are
    then at the root of the mount.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounts = [root / "sys/fs/cgroup" / controllers] if controllers else []
        if not controllers:
            # beside version 1, version 2 is mounted separately below
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        group = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for folder in (group, *group.parents):
                yield mount / folder


def _quota(group: Path) -> int | None:
    """Return how many cores' worth of time a group has, rounded down, but at least 1."""
    words = (_words(group / "cpu.max") or [])[:2]
    if not words:
        v1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in v1 for word in _words(group / name)]
    if len(words) < 2 or words[0] in ("max", "-1"):  # noqa: PLR2004 -- quota and period
        return None
    return max(1, int(words[0]) // int(words[1]))


def _allowance(group: Path) -> int | None:
    """Return how much memory a group still allows; its file cache counts as free."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        words = _words(group / limit)
        used = _words(group / usage)
        if not words or not used or words[0] == "max" or int(words[0]) >= UNLIMITED:
            continue
        statistics = _words(group / "memory.stat")
        counted = dict(zip(statistics[::2], statistics[1::2], strict=False))
        return max(0, int(words[0]) - int(used[0]) + int(counted.get(cache, 0)))
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").split()
    except OSError:
        return []
