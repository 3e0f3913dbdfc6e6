"""QEMU options that all of vmprovision's machines share, as in qemu-system(1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

Accelerator = Literal["kvm", "tcg"]

# On the kernel's command line of an appliance: on TCG its TSC is the host's, which may not
# agree between the host's processors. QEMU's other clocks are the host's monotonic clock.
CLOCK = "tsc=unstable"


def accelerator_options(
    accelerator: Accelerator, *, tcg: str = "tcg", processor: str = "max"
) -> list[str]:
    """Return the accelerator, and the processor that goes with it.

    Args:
        accelerator: KVM, which gives the host's own processor, or TCG.
        tcg: TCG with its properties.
        processor: TCG's processor. QEMU's default lacks x86-64-v2, which current
            distributions require.
    """
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", tcg, "-cpu", processor]


def socket_options(name: str, path: Path | str) -> list[str]:
    """Return a character device that connects to one of vmprovision's Unix sockets."""
    return ["-chardev", f"socket,id={name},path={path}"]
