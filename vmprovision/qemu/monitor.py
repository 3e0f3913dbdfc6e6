"""What is said to a running QEMU, over Unix sockets that it connects to.

``Monitor`` speaks the QEMU Machine Protocol (QMP).
"""

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
UNDERSCORED = ("logical_block_size", "physical_block_size")  # properties of QEMU's that are so
CATCH_UP_SECONDS = 2.0
GONE = "the appliance was ended: its QEMU was killed, or crashed"
GONE_HINT = "the image is as it was; `dmesg` says whether the host had no memory left: try again"


class Listener:
    """A Unix socket that QEMU is to connect to, once."""

    def __init__(self, path: Path) -> None:
        """Listen at a path that does not exist."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(1)

    def accept(self, seconds: float, is_alive: Callable[[], bool]) -> Connection:
        """QEMU's connection, after which nobody else can connect.

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
        """Listen no longer."""
        self._socket.close()


class Connection:
    """Lines to and from QEMU; every wait has a time limit."""

    def __init__(self, connected: socket.socket) -> None:
        """Take the connected socket."""
        self._socket = connected
        self._rest = b""

    def send(self, line: str) -> None:
        """Send one line.

        Raises:
            ApplianceError: QEMU is gone.
        """
        try:
            self._socket.sendall(line.encode() + b"\n")
        except OSError as exc:
            raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc

    def send_file(self, line: str, handle: int) -> None:
        """Send one line with an open file.

        Raises:
            ApplianceError: QEMU is gone.
        """
        try:
            socket.send_fds(self._socket, [line.encode() + b"\n"], [handle])
        except OSError as exc:
            raise ApplianceError(f"QEMU is gone: {exc.strerror}") from exc

    def receive(self, seconds: float) -> str:
        """The next line.

        Raises:
            ApplianceError: none came in time, or QEMU is gone.
        """
        line = self.receive_soon(seconds)
        if line is None:
            raise ApplianceTimeoutError("QEMU does not answer")
        return line

    def receive_soon(self, seconds: float) -> str | None:
        """The next line; None where none comes in time.

        Raises:
            ApplianceError: QEMU is gone.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as exc:
                raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc
            self._rest += data
            if not data:
                raise ApplianceEndedError(GONE, hint=GONE_HINT)
            if len(self._rest) > LINE_LIMIT:
                raise ApplianceError("QEMU talks nonsense")
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def has_data(self) -> bool:
        """Whether anything can be read now."""
        self._socket.setblocking(False)  # noqa: FBT003 -- positional-only
        with contextlib.suppress(OSError):
            return bool(self._rest or self._socket.recv(1, socket.MSG_PEEK))
        return bool(self._rest)

    def close(self) -> None:
        """Close our end."""
        self._socket.close()


class Monitor:
    """Commands to one QEMU; one thread at a time uses it.

    Attributes:
        seconds: how long any answer or event may take.
        disk_failures: what QEMU told of files of the host that it could not read or
            write, as its event ``BLOCK_IO_ERROR`` has it.
    """

    def __init__(self, connection: Connection, seconds: float) -> None:
        """Take the connection, and how long any answer or event may take."""
        self._connection = connection
        self.seconds = seconds
        self._events: list[str] = []
        self.disk_failures: list[dict[str, Any]] = []
        self._next()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 -- any JSON value
        """What a command returns; an argument's underscores stand for hyphens, but for a few.

        Raises:
            ApplianceError: QEMU refuses it, does not answer or is gone.
        """
        named = {
            name if name in UNDERSCORED else name.replace("_", "-"): value
            for name, value in arguments.items()
        }
        self._connection.send(json.dumps({"execute": command, "arguments": named}))
        return self._answer(command)

    def give_file(self, handle: int) -> int:
        """Give QEMU an open file; the number of the set by which it is opened there.

        Raises:
            ApplianceError: QEMU refuses it, does not answer or is gone.
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
        """Wait for an event, which may have come already.

        Raises:
            ApplianceError: it does not come in time, or QEMU is gone.
        """
        while event not in self._events:
            self._next()
        self._events.remove(event)

    def wait_for_migration(self, seconds: float) -> None:
        """Wait until a state is saved or loaded as a whole.

        Raises:
            ApplianceError: that failed, took longer, or QEMU is gone.
        """
        deadline = time.monotonic() + seconds
        while (status := self.ask("query-migrate").get("status")) != "completed":
            if status == "failed":
                raise ApplianceError("QEMU cannot save or load the machine's state")
            if time.monotonic() > deadline:
                raise ApplianceTimeoutError("QEMU does not save or load the machine's state")
            time.sleep(POLL_SECONDS)

    def catch_up(self) -> None:
        """Take in all that QEMU has said until now, if it still runs; what failed is known."""
        self.seconds = CATCH_UP_SECONDS
        with contextlib.suppress(ApplianceError):
            self.ask("query-status")

    def listen_to_the_end(self) -> None:
        """Take in all that a QEMU says that is about to end."""
        with contextlib.suppress(ApplianceError):
            while True:
                self._next()

    def close(self) -> None:
        """Talk to it no longer."""
        self._connection.close()

    def _next(self) -> dict[str, Any]:
        try:
            message = json.loads(self._connection.receive(self.seconds))
        except ValueError as exc:
            raise ApplianceError("QEMU talks nonsense") from exc
        if not isinstance(message, dict):
            raise ApplianceError("QEMU talks nonsense")
        if message.get("event") == "BLOCK_IO_ERROR":
            self.disk_failures.append(message["data"])
        elif "event" in message:
            self._events.append(str(message["event"]))
        return message
