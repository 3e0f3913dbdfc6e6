"""Files of a tree with other names (hard links), inside it or in a directory of the host."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import vmprovision
from tests.trees import SYSTEMD_TREE, make_tree, tree_state

if TYPE_CHECKING:
    from pathlib import Path


def test_a_tree_of_hard_links_leaves_the_other_one_alone(tmp_path: Path) -> None:
    """After ``cp -al``, a file edited or replaced in one tree stays the same in the other."""
    first, second = tmp_path / "first", tmp_path / "second"
    make_tree(
        first,
        {
            **SYSTEMD_TREE,
            "/etc/rc.local": "#!/bin/sh\necho hello\nexit 0\n",
            "/usr/local/bin/guest-agent": "another's",
        },
    )
    (first / "etc/rc.local").chmod(0o6755)
    shutil.copytree(first, second, symlinks=True, copy_function=os.link)
    before = tree_state(second)
    options = vmprovision.InjectOptions(init="standalone")
    planned = vmprovision.plan(first, options).notes
    notes = vmprovision.inject(first, options).notes
    for path in ("/etc/rc.local", "/usr/local/bin/guest-agent"):
        assert [note for note in notes if f"{path} has other hard links" in note]
        assert [note for note in planned if f"{path} has other hard links" in note]
    assert tree_state(second) == before
    assert (first / "etc/rc.local").stat().st_mode & 0o7777 == 0o755
    assert not [
        note for note in vmprovision.inject(first, options).notes if "other hard links" in note
    ]
    vmprovision.remove(first)
    assert tree_state(second) == before
