"""One QEMU process: started so that it cannot outlive this process, ended for certain.

QEMU runs under ``lifeline.py``, which kills it when this process dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from typing import IO, TYPE_CHECKING

from vmprovision.qemu import lifeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self


class QemuProcess:
    """A running QEMU. The thread that made it owns it; only ``cut`` is for other threads."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: int | IO[bytes],
        errors: int | IO[bytes],
        keep: Sequence[int] = (),
        folder: Path | None = None,
    ) -> None:
        """Start QEMU.

        Args:
            command: the program and its options.
            output: gets what QEMU prints; ``subprocess.PIPE`` makes it readable as ``output``.
            errors: gets QEMU's error messages.
            keep: descriptors that QEMU inherits.
            folder: where QEMU runs, if not here.

        Raises:
            OSError: QEMU's supervisor cannot be started.
        """
        self._lifeline, far_end = socket.socketpair()
        with far_end, contextlib.ExitStack() as stack:
            stack.callback(self._lifeline.close)
            self._process = subprocess.Popen(  # noqa: S603 -- an argument list, never a shell
                lifeline.supervised(far_end.fileno(), list(command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                pass_fds=[far_end.fileno(), *keep],
                cwd=folder,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,  # Ctrl-C is for this process, which then ends QEMU
            )
            stack.pop_all()

    def __enter__(self) -> Self:
        """Give the process itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self.end()

    @property
    def output(self) -> IO[bytes] | None:
        """What QEMU prints, if it was started with a pipe."""
        return self._process.stdout

    @property
    def status(self) -> int | None:
        """The exit status, None while QEMU runs."""
        return self._process.poll()

    def is_running(self) -> bool:
        """Return whether QEMU runs."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> bool:
        """Wait for QEMU to end by itself; return whether it did in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.is_running()

    def cut(self) -> None:
        """Have QEMU killed, without waiting for its end; any thread may call this."""
        with contextlib.suppress(OSError):  # it has ended
            self._lifeline.shutdown(socket.SHUT_RDWR)

    def end(self, seconds: float | None = None) -> None:
        """Kill QEMU with all that it has started, and wait for its end.

        Args:
            seconds: how long to wait, since the kernel may never let go of a process
                that hangs in KVM; without a limit if None.
        """
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._lifeline.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
