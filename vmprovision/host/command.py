"""Run a program of the host; every other module does it through here."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import CancelledError, CommandError

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

STDERR_TAIL = 600
OUTPUT_LIMIT = 4 << 20  # bytes kept of each stream; further output is dropped
POLL_SECONDS = 0.2
ENDING_SECONDS = 30.0  # in which a cancelled program can remove what it has made


def find_program(name: str) -> Path:
    """Return where a program is, also in the folders that only root's ``PATH`` has.

    Raises:
        CommandError: it is not installed.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise CommandError(
            f"the program {name} is not installed", hint="`vmprovision doctor` names the package"
        )
    return Path(path)


def run(  # noqa: PLR0913 -- one parameter for each thing that differs
    argv: Sequence[str | Path],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    accept: Sequence[int] = (0,),
    keep: Sequence[int] = (),
    memory: int | None = None,
    cancelled: threading.Event | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a host program to its end; return its output and errors as text in the C locale.

    The program gets no standard input, so it can never wait for a person.

    Args:
        argv: program and arguments; no shell is involved.
        timeout: seconds after which the program is killed.
        environment: variables to set besides those of this process.
        folder: its working directory, if not this process's.
        accept: the exit statuses that are not failures.
        keep: open files that the program inherits, so that a lock on one of them
            lives as long as the program, even if this process is killed.
        memory: bytes of address space that the program may have.
        cancelled: set it to end the program. It and its children get SIGTERM, and SIGKILL if
            they have not ended half a minute later.

    Raises:
        CommandError: the program is missing, was killed at its time limit, or
            ended with a status that is not accepted.
        CancelledError: ``cancelled`` was set.
    """
    words = [str(word) for word in argv]
    shown = shlex.join(words)
    log.debug("running %s", shown)
    try:
        process = subprocess.Popen(  # noqa: S603 -- argument lists only, never a shell
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=tuple(keep),
            cwd=folder,
            start_new_session=True,  # only this process acts on a terminal's Ctrl-C
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except FileNotFoundError as exc:
        raise CommandError(
            f"the program {words[0]} is not installed",
            hint="`vmprovision doctor` names the package",
            is_missing=True,
        ) from exc
    except OSError as exc:
        raise CommandError(f"cannot run {words[0]}: {exc.strerror}") from exc
    with process:
        try:
            if memory is not None:
                with contextlib.suppress(ProcessLookupError):  # it has already ended
                    resource.prlimit(process.pid, resource.RLIMIT_AS, (memory, memory))
            done = _finished(process, words, timeout, cancelled)
        except subprocess.TimeoutExpired as exc:
            raise CommandError(f"{words[0]} did not end within {timeout:.0f} s: {shown}") from exc
        finally:
            if process.returncode is None:
                _signal_all(process, signal.SIGKILL)
    if done.returncode not in accept:
        tail = done.stderr.strip()[-STDERR_TAIL:] or f"exit status {done.returncode}"
        raise CommandError(f"{words[0]} failed: {tail}", stderr=done.stderr)
    return done


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let a program and its children clean up and end; wait until they have, but not for ever."""
    _signal_all(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=ENDING_SECONDS)


def _signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a program that was not waited for, and to its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _finished(
    process: subprocess.Popen[bytes],
    words: Sequence[str],
    timeout: float,
    cancelled: threading.Event | None,
) -> subprocess.CompletedProcess[str]:
    """Read a program's output until it ends; keep at most ``OUTPUT_LIMIT`` of each stream.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
        CancelledError: ``cancelled`` was set.
    """
    deadline = time.monotonic() + timeout
    kept = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as selector:
        for stream, buffer in zip((process.stdout, process.stderr), kept, strict=True):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, buffer)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(left if cancelled is None else min(left, POLL_SECONDS))
            if cancelled is not None and cancelled.is_set():
                _end(process)
                raise CancelledError("cancelled", hint="nothing was changed")
            if not ready and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(words, timeout)
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.extend(data[: OUTPUT_LIMIT - len(key.data)])
    status = process.wait(max(0.0, deadline - time.monotonic()))
    output, errors = (bytes(buffer).decode("utf-8", "replace") for buffer in kept)
    return subprocess.CompletedProcess(words, status, output, errors)
