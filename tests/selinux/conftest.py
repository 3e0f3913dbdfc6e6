"""The policies that the tests of this folder share."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.selinux.libselinux import LibSELinux
from tests.selinux.policy import NAMES, debian_policy
from tests.trees import make_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_CONTEXTS = f"etc/selinux/default/contexts/files/{NAMES[0]}"


@pytest.fixture(scope="session")
def policy_files() -> dict[str, bytes]:
    """Return Debian's policy by guest path; building it the first time takes a minute."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    return debian_policy()


@pytest.fixture(scope="session")
def real_rules(
    policy_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LibSELinux]:
    """Return the same policy as libselinux reads it."""
    root = make_tree(tmp_path_factory.mktemp("policy"), policy_files)
    rules = LibSELinux(root / FILE_CONTEXTS)
    yield rules
    rules.close()
