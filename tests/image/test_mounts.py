"""Disks whose fstab mounts more than the root, by names that are hard to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.composed import Part, compose_disk, ext4, run_tool, starts_of
from tests.trees import SYSTEMD_TREE, Link
from vmprovision.errors import UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

pytestmark = pytest.mark.appliance

UUID = "0f0e0d0c-0b0a-4908-8706-050403020100"
BY_PATH = "/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0"
LOCAL = {"/bin": None, "/lib": None, "/share": None}
BACKUP = {"/2026/file": "x"}


def root(*fstab: str) -> Part:
    """Return a root whose /usr/local is an empty directory, and whose fstab has these lines."""
    tree = {name: what for name, what in SYSTEMD_TREE.items() if name != "/usr/local/bin"}
    text = "".join(f"{line}\n" for line in fstab)
    return ext4("name=root", "-U", UUID, files={**tree, "/usr/local": None, "/etc/fstab": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A disk of a root and one more filesystem, and where the agent must be then.

    Attributes:
        second: what the other filesystem holds.
        refused: what the refusal says; empty if the agent goes into the other filesystem.
    """

    fstab: Sequence[str]
    second: Mapping[str, str | None]
    refused: str = ""
    slow: bool = True


CASES = {
    "by-path-as-the-root": Case(
        fstab=(f"{BY_PATH}-part1 / ext4", f"{BY_PATH}-part2 /usr/local ext4"),
        second=LOCAL,
        slow=False,
    ),
    "by-partlabel": Case(fstab=("/dev/disk/by-partlabel/x\\x20y /usr/local ext4",), second=LOCAL),
    "another-letter": Case(fstab=("/dev/vdb1 / ext4", "/dev/vdb2 /usr/local ext4"), second=BACKUP),
    "by-content": Case(
        fstab=(f"UUID={UUID} / ext4", "/dev/disk/by-id/x-part2 /usr/local ext4"), second=LOCAL
    ),
    "not-by-content": Case(
        fstab=(f"UUID={UUID} / ext4", "/dev/disk/by-id/x-part2 /usr/local ext4"),
        second=BACKUP,
        refused="/dev/disk/by-id/x-part2 on /usr/local (line 2 of /etc/fstab)",
        slow=False,
    ),
    "another-disk": Case(
        fstab=("/dev/vda1 / ext4", "/dev/vdb2 /usr/local ext4 nofail"),
        second=BACKUP,
        refused="/dev/vdb2 on /usr/local (line 2 of /etc/fstab)",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if case.slow else name
        for name, case in CASES.items()
    ],
)
def test_what_fstab_mounts_gets_the_agent(name: str, tmp_path: Path) -> None:
    """The agent is where the running guest sees it, or the guest is refused."""
    case = CASES[name]
    parts = [root(*case.fstab), ext4('name="x y"', files=case.second)]
    image = compose_disk(tmp_path / "disk.raw", "label: gpt", parts)
    if case.refused:
        with pytest.raises(UnsupportedGuestError, match="would be hidden") as refusal:
            vmprovision.inject(image)
        assert case.refused in refusal.value.message
        return
    report = vmprovision.inject(image)
    assert dict(report.guest.mountpoints) == {"/": "/dev/sda1", "/usr/local": "/dev/sda2"}
    inside = tmp_path / "second.ext4"
    inside.write_bytes(image.read_bytes()[starts_of(image)[1] :])
    assert "guest-agent" in run_tool("debugfs", "-R", "ls -p /bin", str(inside))


@pytest.mark.slow
def test_a_link_into_a_mount_is_followed(tmp_path: Path) -> None:
    """A path on one mount may lead into another mount."""
    tree = {name: what for name, what in SYSTEMD_TREE.items() if name != "/usr/local/bin"}
    files = {
        **tree,
        "/usr/local": Link("/srv/more"),
        "/srv": None,
        "/etc/fstab": "LABEL=srv /srv ext4 defaults 0 2\n",
    }
    second = ext4("", "-L", "srv", files={"/more/bin": None})
    image = compose_disk(tmp_path / "disk.raw", "label: gpt", [ext4(files=files), second])
    report = vmprovision.inject(image)
    assert report.guest.mountpoints["/srv"] == "/dev/sda2"
    assert "/srv/more/bin/guest-agent" in map(str, report.changed)
