"""Guests on MD arrays: never written to by halves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.stacks import Stack, build_stack, look

if TYPE_CHECKING:
    from tests.image.conftest import Refuse

pytestmark = pytest.mark.appliance

DATA_OFFSET = 4 << 20  # behind both superblocks, and inside the array's data

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
    """Return the two disks of a guest on RAID 1."""
    script = MIRROR.format(metadata="1.2", members="$A $B")
    return build_stack(tmp_path_factory.mktemp("mirror"), Stack(script=script, sizes_mb=(32, 32)))


def test_half_a_mirror_is_refused(mirror: list[Path], refuse: Refuse) -> None:
    """A write to one half of a mirror would be lost, or overwrite the other half, at boot."""
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


@pytest.mark.slow
def test_both_halves_of_a_mirror_stay_alike(mirror: list[Path], tmp_path: Path) -> None:
    """The guest finds a clean array whose members have seen the same changes."""
    disks = [Path(shutil.copy(disk, tmp_path)) for disk in mirror]
    report = vmprovision.inject(disks[0], source=vmprovision.ImageOptions(disks=(disks[1],)))
    assert report.guest.mountpoints["/"].startswith("/dev/md")
    first, second = (disk.read_bytes()[DATA_OFFSET:] for disk in disks)
    assert first == second
    examined = look(disks, "mdadm --examine /dev/sda /dev/sdb")
    events = [line.split()[-1] for line in examined.splitlines() if "Events" in line]
    states = [line.split()[-1] for line in examined.splitlines() if " State :" in line]
    assert len(events) == 2
    assert len(set(events)) == 1
    assert states == ["clean", "clean"]
    assert examined.count("Array State : AA") == 2
