"""Watch one QEMU: its console, its monitor, its time limit and its end."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from vmprovision.errors import ApplianceEndedError, ApplianceError, CancelledError, ProofError
from vmprovision.proof.machine.console import Console
from vmprovision.qemu.monitor import Connection, Monitor
from vmprovision.qemu.process import QemuProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vmprovision.progress import Control

ANSWER_SECONDS = 30.0
QUIT_SECONDS = 5.0
ERROR_BYTES = 64 << 10

SHUTDOWN_REASONS = {
    "guest-shutdown": "it powered itself off",
    "guest-reset": "it reset itself",
    "guest-panic": "its kernel panicked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """The console and the monitor, with both ends of each."""

    console: socket.socket
    console_end: socket.socket
    monitor: socket.socket
    monitor_end: socket.socket

    def options(self) -> list[str]:
        """Return the options that connect QEMU's serial port and monitor to its ends."""
        return [
            *("-chardev", f"socket,id=console,fd={self.console_end.fileno()}"),
            *("-serial", "chardev:console"),
            *("-chardev", f"socket,id=monitor,fd={self.monitor_end.fileno()}"),
            *("-mon", "chardev=monitor,mode=control"),
        ]

    def far_ends(self) -> list[int]:
        """Return the descriptors that QEMU inherits."""
        return [self.console_end.fileno(), self.monitor_end.fileno()]

    def close_far_ends(self) -> None:
        """Close QEMU's ends here, so that QEMU's death becomes an end of file."""
        self.console_end.close()
        self.monitor_end.close()


@contextlib.contextmanager
def open_channels() -> Iterator[Channels]:
    """Make the channels, and close them at the end of the block."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        for pair in pairs:
            for end in pair:
                stack.callback(end.close)
        (console, console_end), (monitor, monitor_end) = pairs
        yield Channels(
            console=console, console_end=console_end, monitor=monitor, monitor_end=monitor_end
        )


class Watch:
    """A running QEMU. One thread uses it, beside that of its console."""

    def __init__(  # noqa: PLR0913 -- a machine's command and its limits
        self,
        command: Sequence[str],
        channels: Channels,
        errors: IO[bytes],
        control: Control,
        *,
        files: Sequence[int],
        seconds: float,
        console_log: Path | None,
    ) -> None:
        """Start QEMU.

        Args:
            command: QEMU and its options, with those of the channels.
            channels: the machine's.
            errors: gets what QEMU prints.
            control: cancels.
            files: open files that QEMU inherits.
            seconds: how long the machine may run.
            console_log: a file that gets what the console prints.
        """
        self._errors = errors
        self._control = control
        self._deadline = time.monotonic() + seconds
        self._own_reason = ""
        self._connection = Connection(channels.monitor)
        self._monitor: Monitor | None = None
        self._console = Console(channels.console, console_log, self._end_when_due)
        self._process = QemuProcess(
            command, output=errors, errors=errors, keep=[*channels.far_ends(), *files]
        )
        channels.close_far_ends()
        self._console.start()

    def stop(self) -> None:
        """End QEMU: ask it first, then kill it. Nothing of it remains."""
        if self._monitor is not None:
            self._monitor.seconds = QUIT_SECONDS
            with contextlib.suppress(ApplianceError):
                self._monitor.ask("quit")
            self._process.wait(QUIT_SECONDS)
        self._process.end()
        self._console.join()

    def ask(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 -- any JSON value
        """Return what QEMU's monitor answers to a command.

        Raises:
            ProofError: QEMU refuses the command, does not answer, or has ended.
            CancelledError: the caller cancelled.
        """
        try:
            if self._monitor is None:
                self._monitor = Monitor(self._connection, ANSWER_SECONDS)
            return self._monitor.ask(command, **arguments)
        except ApplianceError as exc:
            self.raise_cancelled()
            if isinstance(exc, ApplianceEndedError):
                self._process.wait(QUIT_SECONDS)
            reason = self.exit_reason() or exc.message
            raise ProofError(f"the machine did not start: {reason}") from exc

    def console(self) -> bytes:
        """Return the last bytes that the console printed."""
        return self._console.tail()

    def is_running(self) -> bool:
        """Return whether QEMU runs."""
        return self._process.is_running()

    def exit_reason(self) -> str:
        """Return why the guest can no longer come up, as words; empty while it can."""
        if self._own_reason:
            return self._own_reason
        if self._console.has_panicked:
            return "its kernel panicked"
        is_running = self.is_running()
        if self._monitor is not None:
            self._monitor.drain()  # also keeps QEMU from collecting events for us
        if is_running:
            return ""
        if self._monitor is not None and self._monitor.shutdown_reason:
            shutdown = self._monitor.shutdown_reason
            return SHUTDOWN_REASONS.get(shutdown, f"QEMU ended ({shutdown})")
        return f"QEMU ended: {self._stderr() or 'it was killed'}"

    def raise_cancelled(self) -> None:
        """Raise ``CancelledError`` if the caller cancelled."""
        if self._control.cancelled.is_set():
            raise CancelledError("cancelled", hint="the image is unchanged")

    def _stderr(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read(ERROR_BYTES).decode("utf-8", "replace").split("\n")
        return "; ".join(line.strip() for line in lines if line.strip())[-600:]

    def _end_when_due(self) -> None:
        """End QEMU if the caller has cancelled or the time is up, in the console's thread."""
        if self._own_reason:
            return
        if self._control.cancelled.is_set():
            self._own_reason = "it was cancelled"
        elif time.monotonic() > self._deadline:
            self._own_reason = "it reached its time limit"
        if self._own_reason:
            self._process.cut()
