"""Forty of the kills that ``nox -s crash`` does: no fault, whatever is killed and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.crash.kills import Case, Originals, carry_out, draw_cases, made_originals

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.appliance

SEED = 7
CASES = draw_cases(40, SEED)


@pytest.fixture(scope="session")
def originals(shared_folder: Path) -> Iterator[Originals]:
    """Give the guests to work on."""
    with made_originals(shared_folder / "kills") as made:
        yield made


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.number}-{c.target}-{c.action}-{c.victim}-{c.step}" for c in CASES]
)
def test_kill(case: Case, originals: Originals, tmp_path: Path) -> None:
    """The image is untouched, finished or recoverable, and the same command again completes it."""
    outcome = carry_out(case, originals, tmp_path / "scene")
    assert outcome.faults == ()
