"""Forty of the kills that ``nox -s crash`` does: no fault, whatever is killed and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.crash.kills import Case, Originals, carry_out, draw_cases, make_originals

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

SEED = 7
CASES = draw_cases(40, SEED)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """Return the guests to work on, and how long each step takes on this host."""
    return make_originals(tmp_path_factory.mktemp("kills") / "originals")


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.number}-{c.target}-{c.action}-{c.victim}-{c.step}" for c in CASES]
)
def test_kill(case: Case, originals: Originals, tmp_path: Path) -> None:
    """The image is untouched, finished or recoverable, and the same command again completes it."""
    outcome = carry_out(case, originals, tmp_path / "scene")
    assert outcome.faults == ()
