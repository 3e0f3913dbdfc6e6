"""The one way in which vmprovision runs a program of the host."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

STDERR_TAIL = 600


def run(  # noqa: PLR0913 -- one parameter for each thing that differs
    argv: Sequence[str | Path],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    accept: Sequence[int] = (0,),
    keep: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Standard output and error of a finished host program, as text in the C locale.

    The program gets no standard input, so it can never wait for a person.

    Args:
        argv: program and arguments; no shell is involved.
        timeout: seconds after which the program is killed.
        environment: variables to set besides those of this process.
        folder: where it runs, if not here.
        accept: the exit statuses that are no failure.
        keep: open files that the program holds too, so that a lock on one of them
            lives as long as the program, even where this process is killed.

    Raises:
        CommandError: the program is missing, was killed at its time limit, or
            ended with a status that is not accepted.
    """
    words = [str(word) for word in argv]
    shown = shlex.join(words)
    log.debug("running %s", shown)
    try:
        done = subprocess.run(  # noqa: S603 -- argument lists only, never a shell
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            pass_fds=tuple(keep),
            cwd=folder,
            start_new_session=True,  # a terminal's Ctrl-C is for us to act upon
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except FileNotFoundError as exc:
        raise CommandError(
            f"the program {words[0]} is not installed",
            hint="`vmprovision doctor` names the package",
        ) from exc
    except OSError as exc:
        raise CommandError(f"cannot run {words[0]}: {exc.strerror}") from exc
    except subprocess.TimeoutExpired as exc:
        raise CommandError(f"{words[0]} was not done after {timeout:.0f} s: {shown}") from exc
    if done.returncode not in accept:
        tail = done.stderr.strip()[-STDERR_TAIL:] or f"exit status {done.returncode}"
        raise CommandError(f"{words[0]} failed: {tail}", stderr=done.stderr)
    return done
