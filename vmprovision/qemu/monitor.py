"""The client of the QEMU Machine Protocol (QMP), and the sockets that QEMU connects to."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import TYPE_CHECKING, Any

from vmprovision.errors import ApplianceEndedError, ApplianceError, ApplianceTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LINE_LIMIT = 1 << 20
ACCEPT_SECONDS = 0.1
POLL_SECONDS = 0.002
# QEMU's own names with underscores; all others have hyphens.
UNDERSCORED = ("logical_block_size", "physical_block_size")
CATCH_UP_SECONDS = 2.0
GONE = "the appliance ended: its QEMU was killed, or crashed"
GONE_HINT = (
    "the image is unchanged; check `dmesg` for the host running out of memory, then try again"
)
GARBLED = "QEMU's monitor sends something other than JSON objects, a line each"


class Listener:
    """A Unix socket to which QEMU connects, once."""

    def __init__(self, path: Path) -> None:
        """Listen at a path that does not exist."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(1)

    def accept(self, seconds: float, is_alive: Callable[[], bool]) -> Connection:
        """Return QEMU's connection and stop listening, so that no other process can connect.

        Raises:
            ApplianceError: QEMU has ended, or did not connect in time.
        """
        deadline = time.monotonic() + seconds
        self._socket.settimeout(ACCEPT_SECONDS)
        while is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                connection = Connection(self._socket.accept()[0])
                self._socket.close()
                return connection
        if is_alive():
            raise ApplianceTimeoutError("QEMU did not start in time")
        raise ApplianceError("QEMU did not start")

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class Connection:
    """A connection that carries lines; every wait has a time limit."""

    def __init__(self, connected: socket.socket) -> None:
        """Take a connected socket."""
        self._socket = connected
        self._rest = b""

    def send(self, line: str, content: bytes = b"") -> None:
        """Send one line, and the bytes that belong to it.

        Raises:
            ApplianceEndedError: QEMU is gone.
        """
        try:
            self._socket.sendall(line.encode() + b"\n" + content)
        except OSError as exc:
            raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc

    def send_file(self, line: str, handle: int) -> None:
        """Send one line with an open file.

        Raises:
            ApplianceEndedError: QEMU is gone.
        """
        try:
            socket.send_fds(self._socket, [line.encode() + b"\n"], [handle])
        except OSError as exc:
            raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc

    def receive(self, seconds: float) -> str:
        """Return the next line.

        Raises:
            ApplianceTimeoutError: no line came in time.
            ApplianceEndedError: QEMU is gone.
        """
        line = self.receive_soon(seconds)
        if line is None:
            raise ApplianceTimeoutError("QEMU does not answer")
        return line

    def receive_bytes(self, count: int, seconds: float) -> bytes:
        """Return the next bytes, whether or not they hold a line.

        Raises:
            ApplianceTimeoutError: they did not come in time.
            ApplianceEndedError: QEMU is gone.
        """
        deadline = time.monotonic() + seconds
        while len(self._rest) < count:
            if not self._receive_more(deadline):
                raise ApplianceTimeoutError("QEMU does not answer")
        found, self._rest = self._rest[:count], self._rest[count:]
        return found

    def receive_soon(self, seconds: float) -> str | None:
        """Return the next line, or None if none comes in time.

        Raises:
            ApplianceError: QEMU is gone.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not self._receive_more(deadline):
                return None
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _receive_more(self, deadline: float) -> bool:
        """Wait for more; return whether any came in time."""
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return False
        except OSError as exc:
            raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc
        self._rest += data
        if not data:
            raise ApplianceEndedError(GONE, hint=GONE_HINT)
        if len(self._rest) > LINE_LIMIT:
            raise ApplianceError(GARBLED)
        return True

    def has_data(self) -> bool:
        """Return whether anything can be read now."""
        self._socket.setblocking(False)  # noqa: FBT003 -- positional-only
        with contextlib.suppress(OSError):
            return bool(self._rest or self._socket.recv(1, socket.MSG_PEEK))
        return bool(self._rest)

    def close(self) -> None:
        """Close our end."""
        self._socket.close()


class Monitor:
    """The monitor of one QEMU; one thread at a time uses it.

    Attributes:
        seconds: how long any answer or event may take.
        disk_failures: the data of each event ``BLOCK_IO_ERROR``: QEMU could not read or
            write a file of the host.
        shutdown_reason: why QEMU ends, as its event ``SHUTDOWN`` says; empty before that.
    """

    def __init__(self, connection: Connection, seconds: float) -> None:
        """Read the greeting and make the monitor ready for commands.

        Args:
            connection: QEMU's.
            seconds: how long any answer or event may take.

        Raises:
            ApplianceError: QEMU does not answer or is gone.
        """
        self._connection = connection
        self.seconds = seconds
        self._events: list[str] = []
        self.disk_failures: list[dict[str, Any]] = []
        self.shutdown_reason = ""
        self._next()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 -- any JSON value
        """Return the answer to a command. Hyphens in QEMU's names are written as underscores.

        Raises:
            ApplianceError: QEMU refuses the command, does not answer or is gone.
        """
        named = {
            name if name in UNDERSCORED else name.replace("_", "-"): value
            for name, value in arguments.items()
        }
        self._connection.send(json.dumps({"execute": command, "arguments": named}))
        return self._answer(command)

    def give_file(self, handle: int) -> int:
        """Give QEMU an open file; return the number N by which it opens ``/dev/fdset/N``.

        Raises:
            ApplianceError: QEMU refuses the file, does not answer or is gone.
        """
        self._connection.send_file(json.dumps({"execute": "add-fd"}), handle)
        return int(self._answer("add-fd")["fdset-id"])

    def _answer(self, command: str) -> Any:  # noqa: ANN401 -- any JSON value
        while True:
            message = self._next()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise ApplianceError(f"QEMU refuses {command}: {message['error'].get('desc')}")

    def wait_for(self, event: str) -> None:
        """Wait for an event; one that has come already counts.

        Raises:
            ApplianceError: the event does not come in time, or QEMU is gone.
        """
        while event not in self._events:
            self._next()
        self._events.remove(event)

    def wait_for_migration(self, seconds: float) -> None:
        """Wait until the machine's state is saved or loaded completely.

        Raises:
            ApplianceError: it failed or took longer, or QEMU is gone.
        """
        deadline = time.monotonic() + seconds
        while (status := self.ask("query-migrate").get("status")) != "completed":
            if status == "failed":
                raise ApplianceError("QEMU could not save or load the machine's state")
            if time.monotonic() > deadline:
                raise ApplianceTimeoutError("QEMU did not save or load the machine's state in time")
            time.sleep(POLL_SECONDS)

    def catch_up(self) -> None:
        """Read all events that QEMU has sent until now, so that every failure is known."""
        self.seconds = CATCH_UP_SECONDS
        with contextlib.suppress(ApplianceError):
            self.ask("query-status")

    def drain(self) -> None:
        """Read the events that have come, without waiting for any."""
        with contextlib.suppress(ApplianceError):  # QEMU is gone: its process says why
            while self._connection.has_data():
                self._next()

    def listen_to_the_end(self) -> None:
        """Read all events of a QEMU that is about to end."""
        with contextlib.suppress(ApplianceError):
            while True:
                self._next()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _next(self) -> dict[str, Any]:
        try:
            message = json.loads(self._connection.receive(self.seconds))
        except ValueError as exc:
            raise ApplianceError(GARBLED) from exc
        if not isinstance(message, dict):
            raise ApplianceError(GARBLED)
        if message.get("event") == "BLOCK_IO_ERROR":
            self.disk_failures.append(message["data"])
        elif message.get("event") == "SHUTDOWN":
            self.shutdown_reason = str(message["data"].get("reason", "unknown"))
        elif "event" in message:
            self._events.append(str(message["event"]))
        return message
