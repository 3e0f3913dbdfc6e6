"""``nox -s crash``: many kills, and the table of docs/safety.md.

The kills are drawn from a seed, so a run can be repeated.  A journal keeps the outcome
of each case; for the same sources, an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.crash.kills import Case, Outcome, carry_out, draw_cases, made_originals
from tests.proof.matrix import source_key
from tests.proof.page import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAGE = REPOSITORY / "docs" / "safety.md"
JOURNALS = REPOSITORY / "build" / "crash"
BEGIN, END = "<!-- kills -->", "<!-- end of kills -->"
VICTIMS = ("command", "group", "QEMU", "qemu-img")
STATES = ("untouched", "pending", "finished")


def run(cases: Sequence[Case], journal: Path, jobs: int) -> list[Outcome]:
    """Carry out the cases that are not in the journal; return the outcomes of all."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    done = {outcome.case: outcome for outcome in _read(journal)}
    todo = [case for case in cases if case not in done]
    with (
        tempfile.TemporaryDirectory(prefix="vmprovision-crash-") as name,
        journal.open("a", encoding="utf-8") as kept,
        ThreadPoolExecutor(jobs) as pool,
        made_originals(Path(name) / "originals") as originals,
    ):
        folder = Path(name)

        def one(case: Case) -> Outcome:
            place = folder / f"case{case.number}"
            outcome = carry_out(case, originals, place)
            if not outcome.faults:
                shutil.rmtree(place)
            return outcome

        for outcome in pool.map(one, todo):
            done[outcome.case] = outcome
            kept.write(json.dumps(asdict(outcome)) + "\n")
            kept.flush()
            _tell(outcome)
    return [done[case] for case in cases]


def _tell(outcome: Outcome) -> None:
    case = outcome.case
    words = (case.number, case.target, case.action, case.victim, outcome.moment, outcome.state)
    sys.stdout.write(" ".join(str(word) for word in (*words, *outcome.faults)) + "\n")
    sys.stdout.flush()


def _read(journal: Path) -> Iterable[Outcome]:
    if not journal.exists():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        document: dict[str, Any] = json.loads(line)
        case = Case(**document["case"])
        yield Outcome(
            case=case,
            moment=document["moment"],
            state=document["state"],
            faults=tuple(document["faults"]),
        )


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the tables of a run: by moment and victim, and by target and action."""
    kills = [outcome for outcome in outcomes if outcome.moment]
    faults = sum(bool(outcome.faults) for outcome in outcomes)
    lines = [
        (
            f"{len(kills)} kills on {time.strftime('%Y-%m-%d')}, {faults} with a fault"
            f" (and {len(outcomes) - len(kills)} cases in which the victim did not run)."
        ),
        "",
        "| last step reported | " + " | ".join(VICTIMS) + " |",
        "|---|" + "---|" * len(VICTIMS),
    ]
    moments = collections.Counter(outcome.moment for outcome in kills)
    for moment in moments:
        cells = [
            _cell([o for o in kills if (o.moment, o.case.victim) == (moment, victim)])
            for victim in VICTIMS
        ]
        lines.append(f"| {moment} | " + " | ".join(cells) + " |")
    lines += ["", "| target and action | found after the kill |", "|---|---|"]
    for target, action in dict.fromkeys((o.case.target, o.case.action) for o in kills):
        chosen = [o for o in kills if (o.case.target, o.case.action) == (target, action)]
        lines.append(f"| {target}, {action} | {_cell(chosen)} |")
    return "\n".join(lines) + "\n"


def _cell(outcomes: Sequence[Outcome]) -> str:
    states = collections.Counter(outcome.state for outcome in outcomes)
    parts = [f"{states[state]} {state}" for state in STATES if states[state]]
    if faults := sum(bool(outcome.faults) for outcome in outcomes):
        parts.append(f"**{faults} faults**")
    return ", ".join(parts)


def write_page(outcomes: Sequence[Outcome]) -> None:
    """Put the tables into docs/safety.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{as_markdown(outcomes)}{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill as often as requested; return 1 if a case has a fault that a user would report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=600, help="how many cases (600); in some the victim never runs"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="the seed from which the cases are drawn"
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--no-page", action="store_true", help="leave docs/safety.md as it is")
    asked = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # recovering warns, and here it is expected
    journal = JOURNALS / f"{source_key()}-{asked.seed}.jsonl"
    outcomes = run(draw_cases(asked.kills, asked.seed), journal, asked.jobs)
    if not asked.no_page:
        write_page(outcomes)
    sys.stdout.write(as_markdown(outcomes))
    return 1 if any(outcome.faults for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
