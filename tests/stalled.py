"""A QEMU monitor in which ``cont`` does nothing, so that a machine stands still; run as a script.

``stalled.py OURS THEIRS`` listens at the path OURS for QEMU, connects to THEIRS, and passes
on all that either says, but for ``cont``, which it answers itself. So the real QEMU loads a
state and obeys its monitor, and its processor never runs: a KVM that hangs looks like that.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from typing import IO


def main(ours: str, theirs: str) -> None:
    """Pass on lines until QEMU ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(ours)
    listener.listen(1)
    qemu, _ = listener.accept()
    client = socket.socket(socket.AF_UNIX)
    client.connect(theirs)
    with qemu.makefile("rwb", 0) as to_qemu, client.makefile("rwb", 0) as to_client:
        threading.Thread(target=obey, args=(to_client, to_qemu), daemon=True).start()
        for line in to_qemu:
            to_client.write(line)


def obey(client: IO[bytes], qemu: IO[bytes]) -> None:
    """Pass on all commands but one."""
    for line in client:
        if json.loads(line).get("execute") == "cont":
            client.write(b'{"return": {}}\n')
        else:
            qemu.write(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
