"""A rehearsal: a restored appliance works on a scratch disk before it gets an image.

Without KVM QEMU translates each piece of the kernel's code when it first runs, and a saved
machine does not keep the translations. That is a third of the time of an injection. An
appliance that waits anyway can have it done.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vmprovision.appliance.drives import Drive
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.snapshot.scratch import SCRATCH
from vmprovision.filesystem.protocol import ROOT, TEXT_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmprovision.appliance.snapshot.restore import RestoredAppliance

log = logging.getLogger(__name__)

DISK, PARTITION = "/dev/sda", "/dev/sda1"
READING = 72 << 10
CONTENT = bytes(42 << 10)  # as large as the agent


def rehearse(restored: RestoredAppliance, may_go_on: Callable[[], bool]) -> bool:
    """Do with the scratch disk what an injection does with an image.

    Args:
        restored: an appliance without a disk; it has none afterwards.
        may_go_on: asked before each step.

    Returns:
        Whether all steps were done.

    Raises:
        ApplianceError: the appliance is of no use any more.
        VmprovisionError: something failed that does not fail with a sound appliance.
    """
    begun = time.monotonic()
    restored.attach(Drive(path=restored.saved.folder / SCRATCH, format="raw", readonly=True))
    done = all(may_go_on() for _ in _steps(restored))
    restored.detach()
    if done:
        log.debug("an appliance has rehearsed for %.2f s", time.monotonic() - begun)
    return done


def _steps(restored: RestoredAppliance) -> Iterator[None]:
    yield
    restored.read_device(DISK, 0, READING)
    restored.read_device(PARTITION, 0, READING)
    restored.mount(PARTITION, "ext4", "/", readonly=False)
    yield
    files = ApplianceFilesystem(restored)
    files.list_directory(ROOT)
    yield
    files.make_directory(ROOT / "folder")
    files.write(ROOT / "folder/file", CONTENT)
    files.symlink(ROOT / "folder/link", "file")
    yield
    files.read(ROOT / "folder/file", limit=TEXT_LIMIT)
    restored.unmount()
