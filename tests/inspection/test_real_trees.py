"""The verdict and the plan on files of real guests, as they were installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.inspection.real_trees import REAL_TREES, RealTree, assemble, look_at
from tests.trees import require_root_filesystem

if TYPE_CHECKING:
    from pathlib import Path


def parameters(trees: list[RealTree]) -> pytest.MarkDecorator:
    """Return one test parameter for each tree, with the tree's name."""
    return pytest.mark.parametrize("tree", trees, ids=lambda tree: tree.name)


def assembled(tree: RealTree, folder: Path) -> Path:
    """Return the guest's root; skip the test if this host does not have its tarball."""
    if tree.tarball:
        require_root_filesystem(tree.tarball)
    root = assemble(tree, folder / "guest")
    assert root is not None
    return root


@parameters(list(REAL_TREES))
def test_a_real_guest_gets_what_its_own_init_system_reads(tree: RealTree, tmp_path: Path) -> None:
    """The program that is process 1, who runs the services, and the exact files of ours."""
    root = assembled(tree, tmp_path)
    assert look_at(root) == tree.expected
    # what rc.local is for is the only thing that is not read but known
    likely = tree.expected.dialect == "rc.local"
    assert vmprovision.inspect(root).init.confidence == ("likely" if likely else "certain")


@parameters([tree for tree in REAL_TREES if tree.tarball])
def test_a_whole_root_shows_its_architecture_and_libc(tree: RealTree, tmp_path: Path) -> None:
    """Read from its own programs: all of these are Alpine's, and musl's."""
    root = assembled(tree, tmp_path)
    guest = vmprovision.inspect(root)
    assert guest.arch == ("aarch64" if "aarch64" in tree.tarball else "x86_64")
    assert guest.libc == "musl"
