"""Hostile guests neither keep their reader busy nor cause a traceback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.hostile.fuzz import CORPUS, make_targets
from tests.hostile.guests import GUESTS, SEEDS, Seed, plant
from tests.hostile.limits import is_right, outcome_of
from tests.hostile.texts import TEXTS, executable_scripts
from tests.trees import make_tree

if TYPE_CHECKING:
    from pathlib import Path

KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", [*GUESTS, *TEXTS])
def test_hostile_guest(name: str, tmp_path: Path) -> None:
    """A hostile guest gets a plan or a documented exit code, within the limits."""
    files = GUESTS[name]() if name in GUESTS else executable_scripts(TEXTS[name])
    root = make_tree(tmp_path / "root", files)
    outcome = outcome_of(lambda: (vmprovision.inspect(root, explain=True), vmprovision.plan(root)))
    assert is_right(outcome), outcome


@pytest.mark.parametrize("seed", SEEDS, ids=[seed.path for seed in SEEDS])
def test_seed(seed: Seed, tmp_path: Path) -> None:
    """The valid files that the fuzzer mutates make guests that can be inspected."""
    vmprovision.inspect(plant(seed, seed.content, tmp_path / "root"))


@pytest.mark.parametrize("place", KEPT, ids=[f"{path.parent.name}-{path.name}" for path in KEPT])
def test_what_the_fuzzer_found(place: Path, tmp_path: Path) -> None:
    """Inputs that once found a fault are now answered or refused properly."""
    _, act = make_targets(tmp_path)[place.parent.name]
    (tmp_path / "scene").mkdir()
    outcome = outcome_of(lambda: act(place.read_bytes(), tmp_path / "scene"))
    assert is_right(outcome), outcome
