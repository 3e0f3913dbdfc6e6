"""Run a program that never outlives the process that wanted it; run as a script.

``lifeline.py FD PROGRAM ARGUMENT...`` starts the program and ends when it ends. It
kills the program when the other end of the socket ``FD`` closes. The kernel closes
that end when the process that holds it dies, even by SIGKILL.

``prctl(PR_SET_PDEATHSIG)`` alone, set between fork and exec in vmprovision itself,
would not do: the signal comes when the *thread* that forked ends (prctl(2)), and
vmprovision starts machines from the threads of a pool. This process has one thread,
so the call is right here. It covers the case that this process itself is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1
ISOLATED_PYTHON = ("-S", "-E", "-s")


def supervised(lifeline: int, command: list[str]) -> list[str]:
    """Return the command that runs another one under this script.

    Args:
        lifeline: the descriptor whose other end keeps the program alive.
        command: the program and its arguments.
    """
    return [sys.executable, *ISOLATED_PYTHON, __file__, str(lifeline), *command]


def main(arguments: list[str]) -> int:
    """Return the program's exit status, 128 + signal if a signal ended it."""
    lifeline, command = int(arguments[0]), arguments[1:]
    os.set_inheritable(lifeline, False)  # noqa: FBT003 -- positional-only
    ended, ended_writer = os.pipe()
    os.set_blocking(ended_writer, False)
    signal.set_wakeup_fd(ended_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    child = _start(command)
    status = 0
    while True:
        readable, _, _ = select.select([lifeline, ended], [], [])
        if ended in readable:
            os.read(ended, 64)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
        if lifeline in readable:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _start(command: list[str]) -> int:
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    child = os.fork()
    if child:
        return child
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl
        os._exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.execv(command[0], command)  # noqa: S606 -- an argument list, never a shell
    except OSError as exc:
        os.write(2, f"{command[0]}: {exc.strerror}\n".encode())
        os._exit(127)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
