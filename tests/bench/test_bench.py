"""The benchmarks measure what was really spent."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.bench.measure import Cost
from tests.bench.page import rows_of, table_of
from tests.bench.ways import BASELINE, WAYS, Way

# Leaves a process behind that needs half a second of CPU and 64 MiB.
SPENDS = """
import os, time
if os.fork() == 0:
    os.setsid()
    kept = b"x" * (64 << 20)
    while time.process_time() < 0.5:
        pass
"""
PHASED = """
import sys, time
def spend(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
spend(0.5)
print("ready", flush=True)
sys.stdin.readline()
spend(0.3)
print("done", flush=True)
sys.stdin.readline()
spend(0.5)
"""
MEASURES = """
import dataclasses, json, sys
from tests.bench.measure import become_subreaper, measure
become_subreaper()
cost = measure([sys.executable, "-c", sys.argv[1]], env={}, phased=sys.argv[2] == "phased")
print(json.dumps(dataclasses.asdict(cost)))
"""


def measured(program: str, how: str) -> Cost:
    """Return the cost of a program, measured in a process that may adopt others."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURES, program, how], check=True, capture_output=True, timeout=60
    )
    return Cost(**json.loads(done.stdout))


def test_what_outlives_the_command_is_counted() -> None:
    """The time and memory of a process that is left behind are counted."""
    cost = measured(SPENDS, "whole")
    assert 0.5 <= cost.cpu < 1.5
    assert cost.memory > 64 << 20
    assert cost.strays == 1


def test_only_the_measured_part_is_counted() -> None:
    """The work of a phased command before and after the phase is not counted."""
    assert 0.25 <= measured(PHASED, "phased").cpu < 0.5


def test_the_table_has_medians_and_ratios_for_each_image() -> None:
    """A batch is divided by its images and compared with one run of the baseline."""
    baseline, batch = (
        next(way for way in WAYS if way.name == name)
        for name in (BASELINE, "`inject --jobs 2` of 4")
    )
    costs: dict[Way, list[Cost]] = {
        baseline: [cost(16, 15, 680), cost(18, 15, 680), cost(90, 15, 680)],
        batch: [cost(8, 12, 272)],
    }
    lines = table_of(rows_of(costs), {WAYS[1]: "not measured: install it"})
    assert lines[2:] == [
        f"| {BASELINE} | 18.00 | 15.00 | 680 | 1.0 times | 1.0 times | 1.00 |",
        "| `inject --jobs 2` of 4 | 2.00 | 3.00 | 272 | 9.0 times | 5.0 times | 0.10 |",
        f"| {WAYS[1].name} | not measured: install it | | | | | |",
    ]


def cost(wall: float, cpu: float, mebibytes: int) -> Cost:
    """Make a cost."""
    return Cost(wall=wall, cpu=cpu, memory=mebibytes << 20, strays=0)
