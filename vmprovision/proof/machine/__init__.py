"""A QEMU machine for one throwaway boot of a guest.

The guest is hostile.  Its network is QEMU's user network, cut off from
everything (``restrict=on``) but two ways: a port of the host's loopback leads to
the agent, and one address inside leads to the manager on loopback.  Its console
is kept within limits, its disk is an overlay that the caller throws away, and
QEMU ends with the ``with`` block, with this process (see ``lifeline.py``), or
after its time limit, whichever comes first.
"""

from vmprovision.proof.machine.boot import Machine, boot, wait_for_http
from vmprovision.proof.machine.options import MANAGER_URL, BootSource

__all__ = ["MANAGER_URL", "BootSource", "Machine", "boot", "wait_for_http"]
