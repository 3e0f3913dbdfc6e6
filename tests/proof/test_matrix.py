"""The support matrix says which guests were tried and which were not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.inspection.real_trees import REAL_TREES
from tests.proof.matrix import FAILED, PAGE, Row, try_recipe, untried
from tests.recipe.test_recipe import with_tarball
from vmprovision.initsystem import DEFINITIONS
from vmprovision.progress import Control
from vmprovision.recipe import list_recipes, parse_recipe

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_page_speaks_of_every_recipe_and_real_tree() -> None:
    """The page has every recipe and real tree: run the matrix after adding one."""
    page = PAGE.read_text(encoding="utf-8")
    assert [r.name for r in list_recipes() if f"`{r.name}`" not in page] == []
    assert page.count("| files checked |") == len(REAL_TREES)
    assert FAILED not in page.partition("|---|")[2]


def test_a_guest_that_cannot_be_made_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row gives the reason, and the next run tries again."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    folder, tarball = with_tarball(tmp_path, {"etc": None})
    recipe = parse_recipe(folder)
    assert recipe.tarball is not None
    tarball.write_bytes(b"something else")
    row = try_recipe(recipe, Control(), tmp_path)
    assert row.result == FAILED
    assert "its SHA-256 is" in row.how
    assert not (tmp_path / "cache/matrix").exists()
    tarball.unlink()
    assert try_recipe(recipe, Control(), tmp_path).result == "not tried"


def test_an_init_system_without_a_guest_is_said_to_be_untried() -> None:
    """The page names every init system for which we have a service."""
    rows = [Row(system="systemd", result="booted", how="")]
    assert {row.system for row in untried(rows)} == {each.name for each in DEFINITIONS} - {
        "systemd"
    }
