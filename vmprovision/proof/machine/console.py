"""The serial console of a machine: read for as long as the machine runs, within limits."""

from __future__ import annotations

import contextlib
import re
import select
import threading
from typing import IO, TYPE_CHECKING

from vmprovision.errors import printable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

POLL_SECONDS = 0.2
CONSOLE_BYTES = 256 << 10
LOG_BYTES = 16 << 20
PANIC = b"Kernel panic - not syncing"

_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[()][0-9A-Za-z]|[@-Z\\-_])")


def last_lines(console: bytes, count: int) -> list[str]:
    """Return the last lines of a console that are not blank, safe to print."""
    text = _ESCAPE.sub("", console.decode("utf-8", "replace"))
    lines = [printable(line.rstrip()) for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if line.strip()][-count:] if count > 0 else []


class Console:
    """Read a console in a separate thread, because QEMU blocks if its console is not read.

    Attributes:
        has_panicked: whether the guest's kernel printed a panic.
    """

    def __init__(
        self, connected: socket.socket, log: Path | None, tick: Callable[[], None]
    ) -> None:
        """Prepare to read.

        Args:
            connected: carries what the guest prints.
            log: a file that gets the first 16 MiB unchanged.
            tick: called in the thread several times a second.
        """
        self._socket = connected
        self._log = log
        self._log_left = LOG_BYTES
        self._tick = tick
        self._text = bytearray()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._read, name="console", daemon=True)
        self.has_panicked = False

    def start(self) -> None:
        """Start the thread, which ends with the console."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the console."""
        self._thread.join()

    def tail(self) -> bytes:
        """Return the last bytes that the console printed."""
        with self._guard:
            return bytes(self._text)

    def _read(self) -> None:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log.open("wb")) if self._log else None
            while True:
                readable, _, _ = select.select([self._socket], [], [], POLL_SECONDS)
                if readable:
                    data = b""
                    with contextlib.suppress(OSError):
                        data = self._socket.recv(1 << 16)
                    if not data:
                        return
                    self._keep(data, log)
                self._tick()

    def _keep(self, data: bytes, log: IO[bytes] | None) -> None:
        if log is not None and self._log_left > 0:
            log.write(data[: self._log_left])
            log.flush()
            self._log_left -= len(data)
        with self._guard:
            since = max(0, len(self._text) - len(PANIC))
            self._text += data
            self.has_panicked = self.has_panicked or PANIC in self._text[since:]
            if len(self._text) > 2 * CONSOLE_BYTES:
                del self._text[:-CONSOLE_BYTES]
