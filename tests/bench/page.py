"""The measurements as a table and a plot, in ``docs/performance.md``."""

from __future__ import annotations

import importlib
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import vmprovision
from tests.bench.ways import BASELINE, BATCHES
from vmprovision.appliance.library import guestfs_module, qemu_program
from vmprovision.host.cache import write_atomically
from vmprovision.host.command import run
from vmprovision.qemu.accelerator import choose_accelerator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.measure import Cost
    from tests.bench.ways import Way

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "performance.md"
PLOT = DOCS / "performance.png"
BEGIN, END = "<!-- nox -s bench: begin -->", "<!-- nox -s bench: end -->"
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The medians of one way, for one image each."""

    way: Way
    wall: float
    cpu: float
    memory: float


def rows_of(costs: Mapping[Way, Sequence[Cost]]) -> list[Row]:
    """Return the medians of all measured ways, in their order."""
    return [
        Row(
            way=way,
            wall=median(cost.wall for cost in measured) / way.images,
            cpu=median(cost.cpu for cost in measured) / way.images,
            memory=median(cost.memory for cost in measured),
        )
        for way, measured in costs.items()
        if measured
    ]


def write_page(
    costs: Mapping[Way, Sequence[Cost]], obstacles: Mapping[Way, str], *, rounds: int
) -> None:
    """Put the table between the markers of the page, and the plot beside it."""
    rows = rows_of(costs)
    table = "\n".join([describe_machine(rounds), "", *table_of(rows, obstacles)])
    _draw(rows)
    write_between(BEGIN, END, f"{table}\n\n![The same as a plot]({PLOT.name})")


def write_between(begin: str, end: str, text: str) -> None:
    """Put a text between two marks of the page."""
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    assert found, f"{PAGE} has no {begin}"
    assert ended, f"{PAGE} has no {end}"
    write_atomically(PAGE, f"{before}{begin}\n{text}\n{end}{after}".encode())
    PAGE.chmod(0o644)


def describe_machine(rounds: int) -> str:
    """Return the machine and the versions of the measurement."""
    described = Path("/proc/cpuinfo").read_text("utf-8")
    cpu = re.search(r"^model name\s*: (.*)$", described, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    guestfs = guestfs_module().GuestFS(python_return_dict=True)
    version = guestfs.version()
    guestfs.close()
    libguestfs = ".".join(str(version[part]) for part in ("major", "minor", "release"))
    qemu = qemu_program()
    shown = run([qemu, "--version"], timeout=30).stdout.splitlines()[0]
    kvm = "with KVM" if choose_accelerator(qemu).accelerator == "kvm" else "without KVM"
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    day = time.strftime("%Y-%m-%d", time.gmtime())
    interleaved = "1 round" if rounds == 1 else f"medians of {rounds} interleaved rounds"
    return (
        f"{day}, {interleaved}. {cpu[1] if cpu else platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {kvm}, load at the end {load}. "
        f"vmprovision {vmprovision.__version__}, libguestfs {libguestfs}, {shown}, "
        f"Python {platform.python_version()}, Linux {platform.release()}."
    )


def table_of(rows: Sequence[Row], obstacles: Mapping[Way, str]) -> list[str]:
    """Return the lines of the table: medians for each image, ratios to the baseline if present."""
    baseline = next((row for row in rows if row.way.name == BASELINE), None)
    lines = [
        "| way | wall s an image | CPU s an image | peak MiB | faster, wall | less CPU | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.way.name, f"{row.wall:.2f}", f"{row.cpu:.2f}", f"{row.memory / MIB:.0f}"]
        if baseline:
            cells += [
                f"{baseline.wall / row.wall:.1f} times",
                f"{baseline.cpu / row.cpu:.1f} times",
            ]
            cells += [f"{row.memory / row.way.images / baseline.memory:.2f}"]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {way.name} | {why} | | | | | |" for way, why in obstacles.items()]
    return lines


def _draw(rows: Sequence[Row]) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=[3, 2])
    _draw_single(bars, [row for row in rows if row.way.jobs is None])
    _draw_batches(lines, [row for row in rows if row.way.jobs is not None])
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _draw_single(axes: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 -- matplotlib's
    places = [-place for place in range(len(rows))]
    axes.barh([p + 0.2 for p in places], [row.wall for row in rows], 0.4, label="wall")
    axes.barh([p - 0.2 for p in places], [row.cpu for row in rows], 0.4, label="CPU")
    names = [f"{row.way.name.replace('`', '')}\n{row.memory / MIB:.0f} MiB" for row in rows]
    axes.set_yticks(places, names)
    axes.set_xscale("log")
    axes.set_xlabel("seconds an image")
    axes.legend()


def _draw_batches(axes: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 -- matplotlib's
    for jobs, together in dict.fromkeys((row.way.jobs, row.way.together) for row in rows):
        mine = [row for row in rows if (row.way.jobs, row.way.together) == (jobs, together)]
        label = f"--jobs {jobs}" + (" --together" if together else "")
        axes.plot([r.way.images for r in mine], [r.wall for r in mine], "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, [str(number) for number in BATCHES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in the batch")
    axes.set_ylabel("wall seconds an image")
    if rows:
        axes.legend()
