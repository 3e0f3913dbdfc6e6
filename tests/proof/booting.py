"""A guest that is booted from its own disk, with a manager that listens."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmprovision.appliance.session import Drive
from vmprovision.progress import Control
from vmprovision.proof.machine import BootSource, boot
from vmprovision.proof.report_listener import ReportListener

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vmprovision.proof.machine import Machine

AGENT_PORT = 8080


@contextlib.contextmanager
def booted(
    disk: Path,
    *,
    control: Control | None = None,
    seconds: float = 900.0,
    console_log: Path | None = None,
    firmware: Sequence[str] = (),
) -> Iterator[tuple[Machine, ReportListener]]:
    """Boot a qcow2 image by its own boot loader; give the machine and what listens for reports.

    Args:
        disk: the image, which the guest writes to.
        control: cancels it.
        seconds: as for ``boot``.
        console_log: as for ``boot``.
        firmware: as for ``boot``.
    """
    with (
        ReportListener() as listener,
        boot(
            Drive(path=disk, format="qcow2"),
            source=BootSource(),
            agent_port=AGENT_PORT,
            manager=listener.address,
            control=control or Control(),
            seconds=seconds,
            console_log=console_log,
            firmware=firmware,
        ) as machine,
    ):
        yield machine, listener
