"""Join standard input, a socket, to a TCP address; QEMU runs this as a script.

QEMU's user network starts ``relay.py HOST PORT`` for every connection of the guest to
the forwarded address (``guestfwd=...-cmd:``). The other form of ``guestfwd``, a
character device, is one connection for the whole life of the machine, so only the
first report of a guest would arrive.
"""

from __future__ import annotations

import select
import socket
import sys

CHUNK = 65536
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 120.0


def main(arguments: list[str]) -> int:
    """Return 0 once both sides are done; 1 if nobody listens, so that the guest sees a close."""
    guest = socket.socket(fileno=0)
    try:
        manager = socket.create_connection((arguments[0], int(arguments[1])), CONNECT_SECONDS)
    except OSError:
        return 1
    manager.settimeout(None)
    other = {guest: manager, manager: guest}
    talking = {guest, manager}
    while talking:
        readable, _, _ = select.select(list(talking), [], [], IDLE_SECONDS)
        if not readable:
            return 1
        for side in readable:
            try:
                data = side.recv(CHUNK)
                if data:
                    other[side].sendall(data)
                    continue
                other[side].shutdown(socket.SHUT_WR)
            except OSError:
                return 1
            talking.discard(side)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
