"""The service that ``inject`` prints for the GNU Shepherd starts the agent at boot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.proof.printed import OPTIONS, SHEPHERD, boot_printed_service
from tests.proof.test_machine import BOOT_SECONDS
from vmprovision.errors import UnsupportedGuestError
from vmprovision.progress import Control
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.boot
@pytest.mark.slow
def test_the_shepherd_starts_the_printed_service(tmp_path: Path) -> None:
    """As process 1 it runs the agent, which answers, reports, and is not root."""
    disk = build_image("debian-13-shepherd", output=tmp_path / "guest.qcow2", control=Control())
    with pytest.raises(UnsupportedGuestError, match="Shepherd") as caught:
        vmprovision.inject(disk, OPTIONS)
    assert SHEPHERD in caught.value.hint
    information, _ = boot_printed_service(
        disk, caught.value.configuration, seconds=BOOT_SECONDS, control=Control()
    )
    assert information["init"]["parent"]["pid"] == 1
    assert information["init"]["pid1_exe"] is None  # only root can see it
