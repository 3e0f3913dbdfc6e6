"""A short attack of `nox -s fuzz` on an agent of each family of interpreters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .fuzz import SEED, attack, families

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", families())
def test_an_attack_is_survived(name: str, program: Path, tmp_path: Path) -> None:
    """Three thousand malformed requests: 4xx or closed, served as before, memory flat."""
    done = attack(name, program, tmp_path, 3000, SEED)
    assert sum(done.statuses.values()) > 500
    assert done.statuses[400] > done.statuses[200]
