"""QEMU as a process: started so that it cannot be left behind, and listened to.

The monitor speaks the QEMU Machine Protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.errors import CancelledError, ProofError
from vmprovision.qemu import lifeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vmprovision.progress import Control

MONITOR_SECONDS = 30.0
QUIT_SECONDS = 5.0
WATCH_SECONDS = 0.2
STDERR_BYTES = 64 << 10
CONSOLE_BYTES = 256 << 10
CONSOLE_LOG_BYTES = 16 << 20
MONITOR_LINE_BYTES = 1 << 20

PANIC = b"Kernel panic - not syncing"
SHUTDOWN_REASONS = {
    "guest-shutdown": "it powered itself off",
    "guest-reset": "it reset itself",
    "guest-panic": "its kernel panicked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """Our ends and QEMU's of the console, the monitor, and the lifeline."""

    console: socket.socket
    console_end: socket.socket
    monitor: socket.socket
    monitor_end: socket.socket
    lifeline: socket.socket
    lifeline_end: socket.socket

    def close_far_ends(self) -> None:
        """Close QEMU's ends of the channels here, so that its death shows."""
        for end in (self.console_end, self.monitor_end, self.lifeline_end):
            end.close()


@contextlib.contextmanager
def open_channels() -> Iterator[Channels]:
    """Make the channels; they are closed at the end."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(3)]
        for pair in pairs:
            for end in pair:
                stack.callback(end.close)
        (console, console_end), (monitor, monitor_end), (line, line_end) = pairs
        yield Channels(
            console=console,
            console_end=console_end,
            monitor=monitor,
            monitor_end=monitor_end,
            lifeline=line,
            lifeline_end=line_end,
        )


def channel_options(channels: Channels) -> list[str]:
    """Return the options that connect QEMU's serial port and monitor to the channels."""
    return [
        *("-chardev", f"socket,id=console,fd={channels.console_end.fileno()}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=monitor,fd={channels.monitor_end.fileno()}"),
        *("-mon", "chardev=monitor,mode=control"),
    ]


def start_qemu(
    qemu: Path,
    options: Sequence[str],
    channels: Channels,
    errors: Any,  # noqa: ANN401 -- a temporary file has no public type
    files: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start QEMU under its watcher; both write their complaints into ``errors``.

    QEMU inherits the open ``files``.
    """
    line = channels.lifeline_end.fileno()
    process = subprocess.Popen(  # noqa: S603 -- an argument list, never a shell
        lifeline.bound_to(line, [str(qemu), *options]),
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=[
            line,
            channels.console_end.fileno(),
            channels.monitor_end.fileno(),
            *files,
        ],
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,  # Ctrl-C is for us: QEMU is ended in order
    )
    channels.close_far_ends()
    return process


class Watch:
    """Listens to the console and the monitor of one QEMU in a thread of its own.

    A QEMU whose console nobody reads stands still, so reading cannot wait for
    the caller.
    """

    def __init__(
        self, channels: Channels, control: Control, seconds: float, console_log: Path | None
    ) -> None:
        """Take our ends of the channels, and when to end the machine by itself."""
        self._channels = channels
        self._control = control
        self._ends = time.monotonic() + seconds
        self._log = console_log
        self._log_left = CONSOLE_LOG_BYTES
        self._console = bytearray()
        self._guard = threading.Condition()
        self._answers: list[dict[str, Any]] = []
        self._monitor_rest = b""
        self._shutdown = ""
        self._own_reason = ""
        self._panicked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._thread = threading.Thread(target=self._listen, name="machine", daemon=True)

    def start(self, process: subprocess.Popen[bytes], errors: Any) -> None:  # noqa: ANN401 -- as above
        """Begin to listen."""
        self._process = process
        self._errors = errors
        self._thread.start()

    def stop(self) -> None:
        """End QEMU: first by a request, then through its lifeline; nothing of it remains."""
        assert self._process is not None  # noqa: S101 -- for mypy: set by start()
        with contextlib.suppress(OSError):
            self._send("quit", {})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(QUIT_SECONDS)
        self._channels.lifeline.close()
        self._process.wait()
        self._thread.join()

    def ask(self, command: str, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401 -- any JSON value
        """Return the monitor's answer; for one thread, before anyone waits for the guest."""
        for name, details in (("qmp_capabilities", {}), (command, arguments)):
            with contextlib.suppress(OSError):  # it has ended: told below
                self._send(name, details)
            answer = self._next_answer()
        if "return" not in answer:
            raise ProofError(f"QEMU's monitor refuses {command}: {answer}")
        return answer["return"]

    def console(self) -> bytes:
        """Return the last part of what the console printed."""
        with self._guard:
            return bytes(self._console)

    def is_running(self) -> bool:
        """Return whether QEMU runs."""
        return self._process is not None and self._process.poll() is None

    def exit_reason(self) -> str:
        """Return why the machine cannot go on; empty if it can."""
        if self._own_reason:
            return self._own_reason
        if self._panicked:
            return "its kernel panicked"
        if self.is_running():
            return ""
        if self._shutdown:
            return SHUTDOWN_REASONS.get(self._shutdown, f"QEMU ended ({self._shutdown})")
        return f"QEMU ended: {self._stderr() or 'it was killed'}"

    def raise_cancelled(self) -> None:
        """Raise ``CancelledError`` if the caller cancelled."""
        if self._control.cancelled.is_set():
            raise CancelledError("cancelled", hint="the image is as it was")

    def _send(self, command: str, arguments: Mapping[str, Any]) -> None:
        line = json.dumps({"execute": command, "arguments": arguments}) + "\n"
        self._channels.monitor.sendall(line.encode())

    def _next_answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + MONITOR_SECONDS
        with self._guard:
            while not self._answers:
                self.raise_cancelled()
                if not self._thread.is_alive() or time.monotonic() > deadline:
                    reason = self.exit_reason() or "its monitor does not answer"
                    raise ProofError(f"the machine did not start: {reason}")
                self._guard.wait(WATCH_SECONDS)
            return self._answers.pop(0)

    def _stderr(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read(STDERR_BYTES).decode("utf-8", "replace").split("\n")
        return "; ".join(line.strip() for line in lines if line.strip())[-600:]

    def _listen(self) -> None:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log.open("wb")) if self._log else None
            readers = {
                self._channels.console: lambda data: self._hear_console(data, log),
                self._channels.monitor: self._hear_monitor,
            }
            while readers:
                readable, _, _ = select.select(list(readers), [], [], WATCH_SECONDS)
                for channel in readable:
                    try:
                        data = channel.recv(1 << 16)
                    except OSError:
                        data = b""
                    if data:
                        readers[channel](data)
                    else:
                        del readers[channel]
                self._end_when_due()

    def _end_when_due(self) -> None:
        if self._own_reason:
            return
        if self._control.cancelled.is_set():
            self._own_reason = "it was cancelled"
        elif time.monotonic() > self._ends:
            self._own_reason = "its time was over"
        if self._own_reason:
            with contextlib.suppress(OSError):  # the watcher of QEMU sees the end of file
                self._channels.lifeline.shutdown(socket.SHUT_RDWR)

    def _hear_console(self, data: bytes, log: Any) -> None:  # noqa: ANN401 -- as above
        if log is not None and self._log_left > 0:
            log.write(data[: self._log_left])
            log.flush()
            self._log_left -= len(data)
        with self._guard:
            since = max(0, len(self._console) - len(PANIC))
            self._console += data
            self._panicked = self._panicked or PANIC in self._console[since:]
            if len(self._console) > 2 * CONSOLE_BYTES:
                del self._console[:-CONSOLE_BYTES]

    def _hear_monitor(self, data: bytes) -> None:
        *lines, rest = (self._monitor_rest + data).split(b"\n")
        self._monitor_rest = rest[-MONITOR_LINE_BYTES:]
        for line in lines:
            message = json.loads(line) if line.strip() else {}
            if message.get("event") == "SHUTDOWN":
                self._shutdown = str(message["data"].get("reason", "unknown"))
            elif "return" in message or "error" in message:
                with self._guard:
                    self._answers.append(message)
                    self._guard.notify_all()
