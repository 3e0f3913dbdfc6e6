"""The wrong disk in a stock appliance: udev is late, and the kernel orders its disks otherwise.

Without udev's links guestfsd uses the kernel's own names, in which the appliance's root may
come first: a Debian, on which every operation would succeed.
"""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.tiny import tiny_disk
from vmprovision.appliance import stock
from vmprovision.appliance.drives import WrongDiskError
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE
from vmprovision.appliance.snapshot.ingredients import supermin_inputs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

DAEMON = b"# Run the daemon."
LATE = b"""\
udevadm control --exit
rm -f /dev/disk/by-path/*
if [ "$(stat -c %d /)" -ne "$((8 << 8))" ]; then
    mv /dev/sda /dev/image
    mv /dev/sdb /dev/sda
    mv /dev/image /dev/sdb
    ln -sf ../../sdb /dev/disk/guestfs/*
fi
"""


@pytest.fixture
def late_udev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make libguestfs boot an appliance in which the race is lost every time."""
    inputs = tmp_path / "supermin.d"
    inputs.mkdir()
    for path in supermin_inputs().iterdir():
        if path.name == "init.tar.gz":
            (inputs / path.name).write_bytes(without_links(path.read_bytes()))
        else:
            (inputs / path.name).symlink_to(path)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("LIBGUESTFS_PATH", str(tmp_path))
    monkeypatch.setenv("LIBGUESTFS_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setenv(STOCK_VARIABLE, "1")
    monkeypatch.setattr(stock, "LAUNCHES", 1)


def without_links(archive: bytes) -> bytes:
    """Return libguestfs's process 1, changed to lose the race just before the daemon starts.

    udev's links are gone and do not come back, and the name of the first disk leads to the
    appliance's root. The kernel names disks in the order in which it finishes probing them,
    so the order of QEMU's options does not decide it.
    """
    made = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=made, mode="w:gz") as new,
    ):
        for entry in old:
            file = old.extractfile(entry)
            content = file.read() if file else b""
            if entry.name.endswith("init"):
                assert content.count(DAEMON) == 1
                content = content.replace(DAEMON, LATE + DAEMON)
                entry.size = len(content)
            new.addfile(entry, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.usefixtures("late_udev")
def test_the_appliances_own_root_is_not_taken_for_the_image(tmp_path: Path) -> None:
    """Nothing is inspected and nothing is written."""
    image = tiny_disk(tmp_path / "guest.raw", {})
    before = image.read_bytes()
    with pytest.raises(WrongDiskError, match="is not"):
        vmprovision.inject(image, source=vmprovision.ImageOptions(format="raw"))
    assert image.read_bytes() == before
