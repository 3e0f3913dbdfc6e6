"""Boot a guest once in a QEMU machine of its own.

The guest is hostile. Its network is QEMU's user network, isolated (``restrict=on``)
but for two ways: a port of the host's loopback leads to the agent, and one address
inside leads to the manager on loopback. Its console is kept within limits, and its
disk is an overlay that the caller throws away. QEMU ends with the ``with`` block, with
this process (``qemu/lifeline.py``) or after its time limit, whichever comes first.
"""

from vmprovision.proof.machine.boot import Machine, boot, wait_for_http
from vmprovision.proof.machine.options import HARDWARE, MANAGER_URL, BootSource

__all__ = ["HARDWARE", "MANAGER_URL", "BootSource", "Machine", "boot", "wait_for_http"]
