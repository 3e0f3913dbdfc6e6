"""Work in a process of its own, with limits on its processor time and its memory."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
from typing import TYPE_CHECKING

import vmprovision

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 20  # of processor time: what an attacker may cost the host
MEMORY = 1 << 30  # bytes of address space above what the process has already
WALL_SECONDS = 600.0  # a loaded host
LONGEST = 20_000  # characters of an error

CORRECT = "correct"


def outcome_of(work: Callable[[], object]) -> str:
    """Return how work ended: ``correct``, ``refused with N``, or what went wrong.

    The work runs in a forked process, which is killed if it exceeds the limits.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_limited, args=(work, sender))
    process.start()
    sender.close()
    try:
        said = receiver.recv() if receiver.poll(WALL_SECONDS) else "no answer"
    except EOFError:
        said = ""
    process.join(WALL_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == -signal.SIGXCPU:
        return f"more than {SECONDS} s of processor time"
    return said or f"ended with {process.exitcode}"


def is_right(outcome: str) -> bool:
    """Return whether an outcome is allowed for a hostile input."""
    return outcome == CORRECT or outcome.startswith("refused with ")


def _refusal(error: vmprovision.VmprovisionError) -> str:
    length = len(f"{error.message}{error.hint}")
    if length > LONGEST:
        return f"an error of {length} characters"
    if error.exit_code == 1:
        return f"no exit code: {error!r}"
    return f"refused with {error.exit_code}"


def _limited(work: Callable[[], object], sender: multiprocessing.connection.Connection) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])  # noqa: PTH123, SIM115 -- at once, in a fork
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        work()
    except vmprovision.VmprovisionError as exc:
        sender.send(_refusal(exc))
    except BaseException as exc:  # noqa: BLE001 -- this is what is looked for
        trace = sys.exc_info()[2]
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        sender.send(f"{type(exc).__name__} at {where}: {str(exc)[:200]}")
    else:
        sender.send(CORRECT)
