"""A disk image whose guest has a policy: labels are written through the appliance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.conftest import require
from tests.image.tiny import tiny_disk
from tests.image.trees import Mount, Sight, differences, look_into
from tests.selinux.conftest import policy_files, real_rules
from tests.selinux.test_labels import relabel
from vmprovision.filesystem.local import LocalFilesystem

if TYPE_CHECKING:
    from pathlib import Path

    from tests.image.trees import Stands, Tree
    from tests.selinux.libselinux import LibSELinux

__all__ = ["policy_files", "real_rules"]  # fixtures

pytestmark = pytest.mark.appliance

KINDS = {"0": "file", "5": "directory", "2": "symlink"}
SOURCE = vmprovision.ImageOptions(format="raw")


def label_in(stands: Stands) -> str:
    """Return the label of a guest path; libselinux ends it with a NUL, we need not."""
    (xattr,) = [x for x in stands.xattrs.split("\n") if x.startswith("security.selinux=")]
    return xattr.partition("=")[2].rstrip("\0")


def test_labels_in_an_image_are_those_of_its_policy(
    tmp_path: Path,
    policy_files: dict[str, bytes],
    real_rules: LibSELinux,
) -> None:
    """New files have libselinux's label; after the removal the image is as before."""
    require(LocalFilesystem(tmp_path).takes_labels(), "setting labels needs root")
    image = tiny_disk(
        tmp_path / "guest.raw",
        {**policy_files, "/etc/guest-agent.conf": "theirs\n"},
        finish=lambda root: relabel(root, real_rules),
    )

    def look() -> Tree:
        sight = Sight(path=image, format="raw", mounts=(Mount(device=""),))
        return look_into(sight, tmp_path)

    before = look()
    report = vmprovision.inject(image, source=SOURCE)
    assert report.notes == ()
    injected = look()
    for path in map(str, report.changed):
        stands = injected[path]
        kind = KINDS[stands.kind]
        assert label_in(stands) == real_rules.label_for(path, kind), path  # type: ignore[arg-type]  # one of the three
    assert differences(before, injected).keys() >= set(map(str, report.changed))
    assert vmprovision.verify(image, source=SOURCE).mismatches == ()
    vmprovision.remove(image, source=SOURCE)
    after = look()
    left = differences(before, after)
    assert left.keys() <= {"/etc/guest-agent.conf"}
    for old, new in left.values():
        assert old is not None
        assert new is not None
        assert label_in(old) == label_in(new)
        assert old.content == new.content
