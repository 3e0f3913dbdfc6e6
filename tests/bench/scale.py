"""A batch of a thousand images, killed on its way and resumed: does any cost grow?

``nox -s scale`` injects into that many small disks in shared appliances.  When three in
ten are finished, it kills the command with SIGKILL, and waits until every process of it
has ended.  The second run has the same journal.  Afterwards the journal names all images,
some of them are verified one by one, and neither the folder nor the cache holds anything
of the batch.  The table of ``docs/performance.md`` has a row for each fifth of the images.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import vmprovision
from tests.bench.measure import become_subreaper, descendants, memory_of, reap_strays
from tests.bench.page import MIB, describe_machine, write_between
from tests.bench.ways import new_cache
from tests.image.tiny import tiny_disk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEGIN, END = "<!-- bench: scale -->", "<!-- /bench: scale -->"
KILLED_AT = 0.3
PARTS = 5
VERIFIED = 25
LOOK_SECONDS = 0.5
TWO_HOURS = 7200.0
BLOCK = 512  # of stat(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look at the batch saw.

    Attributes:
        seconds: since the run began.
        finished: the images that the journal has.
        memory: bytes of the whole tree; what its processes share counts once.
        processes: how many there are.
        descriptors: what they have open.
    """

    seconds: float
    finished: int
    memory: int
    processes: int
    descriptors: int


class Batch:
    """A folder of images, and one command after another that works on them."""

    def __init__(self, folder: Path, count: int, jobs: int) -> None:
        """Make the images: each a file of its own."""
        self.images = folder / "images"
        self.images.mkdir()
        self.names = [f"{number:05}.raw" for number in range(count)]
        first = tiny_disk(folder / "first.raw", {})
        for each in self.names:
            subprocess.run(["cp", "--sparse=always", first, self.images / each], check=True)
        self.journal, self.report = folder / "journal", folder / "report"
        self.environment = new_cache(folder)
        self.cache = folder / "cache"
        self._jobs = jobs

    def run(self, *, until: int | None) -> list[Look]:
        """Run the command to its end, or kill it when so many images are finished."""
        words = ["--together", "--jobs", str(self._jobs), "--resume", self.journal, "--json"]
        command = [sys.executable, "-m", "vmprovision", "inject", *map(str, words), *self.names]
        looks, begun = [], time.monotonic()
        with self.report.open("wb") as report:
            process = subprocess.Popen(
                command,
                stdout=report,
                cwd=self.images,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        while process.poll() is None:
            looks.append(self._look(time.monotonic() - begun))
            is_killed = until is not None and looks[-1].finished >= until
            if is_killed or looks[-1].seconds > TWO_HOURS:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(LOOK_SECONDS)
        process.wait()
        reap_strays()
        wanted = 0 if until is None else -signal.SIGKILL
        assert process.returncode == wanted, self.report.read_text("utf-8", "replace")[-2000:]
        return looks

    def _look(self, seconds: float) -> Look:
        tree = list(descendants(os.getpid()))
        return Look(
            seconds=seconds,
            finished=self.finished(),
            memory=sum(map(memory_of, tree)),
            processes=len(tree),
            descriptors=sum(map(_descriptors, tree)),
        )

    def allocated(self) -> int:
        """Return the bytes that the images take on the host's disk."""
        return sum(path.stat().st_blocks for path in self.images.iterdir()) * BLOCK

    def finished(self) -> int:
        """Return how many images the journal has."""
        if not self.journal.exists():
            return 0
        return max(0, self.journal.read_bytes().count(b"\n") - 1)  # the first line is its header

    def check(self) -> Mapping[str, int]:
        """Check what is left; return how many images ended in which way in the second run."""
        ended = collections.Counter(
            result["outcome"] for result in json.loads(self.report.read_bytes())["results"]
        )
        assert self.finished() == len(self.names), self.finished()
        assert sorted(path.name for path in self.images.iterdir()) == self.names
        left = [path.name for path in (self.cache / "run").iterdir()]
        assert not left, left
        source = vmprovision.ImageOptions(format="raw")
        for each in random.sample(self.names, min(len(self.names), VERIFIED)):
            assert not vmprovision.verify(self.images / each, source=source).mismatches, each
        return ended


def _descriptors(process: int) -> int:
    """Return how many descriptors a process has; 0 if it has just ended."""
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{process}/fd").iterdir()))
    return 0


def render_table(looks: Sequence[Look], done_before: int) -> list[str]:
    """Return the rows of the second run: a part of the images each."""
    last = looks[-1].finished
    rows = [
        "| images | s an image | memory, MiB, median | largest | processes | descriptors |",
        "|---|---|---|---|---|---|",
    ]
    step = (last - done_before) / PARTS
    for part in range(PARTS):
        low, high = done_before + part * step, done_before + (part + 1) * step
        seen = [look for look in looks if low <= look.finished <= high]
        images = seen[-1].finished - seen[0].finished if seen else 0
        if not images:
            continue  # a small batch: no image ended between two looks
        memory = sorted(look.memory for look in seen)
        rows.append(
            f"| {round(low) + 1} to {round(high)} "
            f"| {(seen[-1].seconds - seen[0].seconds) / images:.2f} "
            f"| {memory[len(memory) // 2] / MIB:.0f} | {memory[-1] / MIB:.0f} "
            f"| {max(look.processes for look in seen)} "
            f"| {max(look.descriptors for look in seen)} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batch twice and write the page."""
    parser = argparse.ArgumentParser(prog="nox -s scale --", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="only print the table")
    asked = parser.parse_args(arguments)
    become_subreaper()
    with tempfile.TemporaryDirectory(prefix="vmprovision-scale-") as name:
        batch = Batch(Path(name), asked.count, asked.jobs)
        before = batch.allocated()
        first = batch.run(until=round(asked.count * KILLED_AT))
        known = batch.finished()
        looks = batch.run(until=None)
        ended = batch.check()
        grown = (batch.allocated() - before) / asked.count / 1024
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(ended.items()))
    summary = (
        f"{asked.count} images, `inject --together --jobs {asked.jobs}`. Killed with SIGKILL "
        f"after {first[-1].seconds:.0f} s, when {known} were in the journal. The second run: "
        f"{outcomes}, in {looks[-1].seconds:.0f} s. An image grew by {grown:.0f} KiB. "
        f"{describe_machine(1)}"
    )
    text = "\n".join([summary, "", *render_table(looks, known)])
    sys.stdout.write(text + "\n")
    if not asked.dry:
        write_between(BEGIN, END, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
