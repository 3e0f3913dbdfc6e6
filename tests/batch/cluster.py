"""A real Dask scheduler and its workers, each a separate process on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

PATIENCE = 60.0


class Cluster:
    """The scheduler's address, and the workers' processes."""

    def __init__(self, folder: Path, enter: Sequence[str] = ()) -> None:
        """Keep logs and the scheduler's address in this folder.

        Args:
            folder: an empty one.
            enter: the command that runs others, for processes in another namespace.
        """
        self._folder = folder
        self._enter = enter
        self._file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start("scheduler", "--port", "0")
        self.address = self._address()

    def restart_scheduler(self) -> None:
        """Start a scheduler at the address of the first one, which has ended."""
        self._file.unlink()
        self.scheduler = self._start("scheduler", "--port", self.address.rpartition(":")[2])
        self._address()

    def add_worker(self, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a worker that does one job at a time and is not restarted when it dies."""
        file = str(self._file)
        words = ("--no-nanny", "--nthreads", "1", "--local-directory", str(self._folder))
        return self._start("worker", *words, "--scheduler-file", file, env=env)

    def log_of(self, number: int) -> str:
        """Return the log of a process: 0 is the scheduler, workers count from 1."""
        (path,) = self._folder.glob(f"*-{number}.log")
        return path.read_text()

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _start(
        self, kind: str, *words: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        if kind == "scheduler":
            words = (*words, "--scheduler-file", str(self._file))
        with (self._folder / f"{kind}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *self._enter,
                    *(sys.executable, "-m", f"distributed.cli.dask_{kind}"),
                    *("--host", "127.0.0.1", "--no-dashboard", *words),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,  # not here, where Python would find this vmprovision first
                env={**os.environ, **(env or {})},
            )
        self.processes.append(process)
        return process

    def _address(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                address: str = json.loads(self._file.read_text())["address"]
                return address
            time.sleep(0.1)
        raise TimeoutError("the scheduler did not start")


@contextlib.contextmanager
def cluster_in(folder: Path, workers: int, enter: Sequence[str] = ()) -> Iterator[Cluster]:
    """Give a cluster with this many workers; end all its processes afterwards."""
    folder.mkdir()
    cluster = Cluster(folder, enter)
    try:
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.stop()
