"""However much a guest gives to read, inspection ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, make_tree
from vmprovision.errors import InspectionError
from vmprovision.inspection import watched

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("budget", "value"), [("QUESTIONS", 60), ("BYTES", 1), ("SECONDS", 0.0)])
def test_inspection_ends_when_its_budget_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, value: float
) -> None:
    """Too many questions, bytes or processor seconds are one error that names a guest path."""
    root = make_tree(tmp_path / "root", SYSTEMD_TREE)
    assert vmprovision.inspect(root).init.system == "systemd"
    monkeypatch.setattr(watched, budget, value)
    with pytest.raises(InspectionError, match=r"takes too much, last at guest path /") as error:
        vmprovision.inspect(root)
    assert str(root) in str(error.value)
