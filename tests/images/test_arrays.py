"""Guests on MD arrays: never written to by halves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.images.stacks import Stack, build_stack

if TYPE_CHECKING:
    from pathlib import Path

    from tests.images.conftest import Refuse

pytestmark = pytest.mark.appliance

MIRROR = """
mdadm -q --create /dev/md0 --run --metadata={metadata} --bitmap=none --level=1 --raid-devices=2 \
    --name=root --homehost=guest {members}
mdadm -q --wait /dev/md0 || :
mke2fs -q -t ext4 /dev/md0; mount /dev/md0 /sysroot
guest <<END
/dev/md/root / ext4 defaults 0 1
END
"""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The two disks of a guest on RAID 1."""
    script = MIRROR.format(metadata="1.2", members="$A $B")
    return build_stack(tmp_path_factory.mktemp("mirror"), Stack(script=script, sizes_mb=(32, 32)))


def test_half_a_mirror_is_refused(mirror: list[Path], refuse: Refuse) -> None:
    """What is written to one half would be lost, or the other half's content, as the guest boots."""
    error = refuse(mirror[0], 34)
    assert "MD array" in error["message"]
    assert "--disk" in error["hint"]


def test_a_mirror_that_was_degraded_is_injected(tmp_path: Path) -> None:
    """No other member has anything that this one lacks."""
    script = MIRROR.format(metadata="1.0", members="$A missing")
    (image,) = build_stack(tmp_path, Stack(script=script, sizes_mb=(32,)))
    report = vmprovision.inject(image)
    assert report.guest.mountpoints["/"].startswith("/dev/md")
    assert vmprovision.verify(image).mismatches == ()
