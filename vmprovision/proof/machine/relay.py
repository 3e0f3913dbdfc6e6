"""Join standard input, a socket, to a TCP address; run as a script by QEMU.

QEMU's user network starts ``relay.py HOST PORT`` for every connection that the
guest makes to the forwarded address (``guestfwd=...-cmd:``).  Its other form, a
character device, is one connection for the whole life of the machine: a guest
that reports twice would be heard once.
"""

from __future__ import annotations

import select
import socket
import sys

CHUNK = 65536
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 120.0


def main(arguments: list[str]) -> int:
    """Relay until both sides have finished; return 0, or 1 where nobody listens."""
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
