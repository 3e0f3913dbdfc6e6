"""Measure a command with everything that it starts: wall time, CPU time, peak memory.

This process makes itself the subreaper of its descendants (prctl(2)).  So a machine that
a command starts and leaves behind stays in the tree and is counted.  CPU time is the sum
of the ended processes (getrusage(2)) and of the running ones (proc(5)).  Memory is the
sum of proportional set sizes: a page that several processes share counts once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_SECONDS = 0.05
STRAY_SECONDS = 30.0
TICKS = os.sysconf("SC_CLK_TCK")


class CommandFailedError(Exception):
    """The measured command failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A measurement: seconds, seconds, bytes; and how many processes outlived the command."""

    wall: float
    cpu: float
    memory: int
    strays: int


def become_subreaper() -> None:
    """Adopt every descendant whose parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "this process cannot become a subreaper")


def measure(command: Sequence[str | Path], *, env: Mapping[str, str], phased: bool) -> Cost:
    """Return the cost of a command; only one is measured at a time.

    Args:
        command: program and arguments.
        env: variables to set besides those of this process.
        phased: the command prints ``ready``, waits for a line, does what is to be
            measured, and prints ``done``; what comes before and after is not counted.

    Raises:
        CommandFailedError: it failed.
    """
    os.sync()  # else the command's own syncs would wait for the copies made for it
    with tempfile.TemporaryFile() as output, _sampling() as sampler:
        begun, before = time.monotonic(), tree_cpu()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE if phased else subprocess.DEVNULL,
            stdout=subprocess.PIPE if phased else output,
            stderr=output,
            env={**os.environ, **env},
        )
        try:
            if phased and _hears(process, b"ready\n"):
                sampler.peak = 0
                begun, before = time.monotonic(), tree_cpu()
                _says(process, b"\n")
                _hears(process, b"done\n")
                wall, cpu = time.monotonic() - begun, tree_cpu() - before
                _says(process, b"")
                process.wait()
                strays = reap_strays()
            else:
                process.wait()
                wall = time.monotonic() - begun
                strays = reap_strays()
                cpu = tree_cpu() - before
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            tail = output.read()[-800:].decode(errors="replace").strip()
            raise CommandFailedError(f"exit status {process.returncode}: {tail}")
        return Cost(wall=wall, cpu=cpu, memory=sampler.peak, strays=strays)


def tree_cpu() -> float:
    """Return the CPU seconds of all processes below this one, ended or running."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
            seconds += sum(int(field) for field in fields[11:15]) / TICKS
    return seconds


def descendants(process: int) -> Iterator[int]:
    """Return the processes below a process."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                yield int(child)
                yield from descendants(int(child))


def _hears(process: subprocess.Popen[bytes], line: bytes) -> bool:
    assert process.stdout
    while heard := process.stdout.readline():
        if heard == line:
            return True
    return False  # it ended


def _says(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):
        if line:
            process.stdin.write(line)
            process.stdin.flush()
        else:
            process.stdin.close()


def reap_strays() -> int:
    """Wait for the processes that were left to us to end; return how many."""
    number, deadline = 0, time.monotonic() + STRAY_SECONDS
    while time.monotonic() < deadline:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return number
        if ended:
            number += 1
        else:
            time.sleep(SAMPLE_SECONDS)
    raise CommandFailedError(f"left running: {list(descendants(os.getpid()))}")


@contextlib.contextmanager
def _sampling() -> Iterator[_Sampler]:
    """Sample the memory of all descendants repeatedly, in a thread."""
    sampler = _Sampler()
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.stopped.set()
        sampler.join()


class _Sampler(threading.Thread):
    """The largest amount of memory seen, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(memory_of, descendants(os.getpid()))))


def memory_of(process: int) -> int:
    """Return a process's proportional set size in bytes; 0 if it has just ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
