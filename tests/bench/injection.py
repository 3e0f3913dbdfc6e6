"""Measure an injection beside other ways to make the same edit.

``nox -s bench`` runs every way of ``ways.py`` in turn, several times, each on fresh
images, and writes medians and ratios into ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.edit import Edit, edit_for
from tests.bench.measure import CommandFailedError, Cost, become_subreaper, measure
from tests.bench.page import PLOT, rows_of, write_page
from tests.bench.ways import WAYS, Case, Way, guestfs_environment
from tests.conftest import DEBIAN_RECIPE
from vmprovision.progress import Control
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDS = 5


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="a regular expression that names ways")
    parser.add_argument("--dry", action="store_true", help="leave docs/performance.md as it is")
    parser.add_argument("--folder", type=Path, help="where the images are copied to")
    asked = parser.parse_args(arguments)
    wanted = [way for way in WAYS if re.search(asked.only, way.name)]
    obstacles = {way: why for way in wanted if (why := way.obstacle())}
    costs: dict[Way, list[Cost]] = {way: [] for way in wanted if way not in obstacles}
    become_subreaper()
    with tempfile.TemporaryDirectory(prefix="vmprovision-bench-", dir=asked.folder) as name:
        bench = _Bench(Path(name))
        for number in range(asked.rounds):
            for way, measured in costs.items():
                try:
                    measured.append(bench.measure(way, check=number == 0))
                except CommandFailedError as exc:
                    obstacles[way] = f"not measured: {exc}"
                    _say(f"{way.name}: {obstacles[way]}")
                    continue
                _say(f"round {number + 1}: {way.name}: {measured[-1]}")
            for way in obstacles:
                costs.pop(way, None)
    for row in rows_of(costs):
        _say(f"{row.way.name:<44} {row.wall:8.2f} s {row.cpu:8.2f} s {row.memory / 2**20:6.0f} MiB")
    if not asked.dry:
        reasons = {way: why.splitlines()[0].replace("|", "\\|") for way, why in obstacles.items()}
        write_page(costs, reasons, rounds=asked.rounds)
        _say(f"see {PLOT.with_suffix('.md')}")
    return 0


class _Bench:
    """The image and the edit; makes fresh copies for every measurement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base = folder / "base.qcow2"
        shutil.copy(build_image(DEBIAN_RECIPE, control=Control()), self._base)
        self._base.chmod(0o644)
        self._edit: Edit = edit_for(self._base, folder)
        self._environment = guestfs_environment()

    def measure(self, way: Way, *, check: bool) -> Cost:
        """Return the cost of one run of a way.

        Args:
            way: what to measure.
            check: check afterwards that the edit is in the first image.
        """
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            (folder / "work").mkdir()
            images = tuple(self._fresh(folder, way, number) for number in range(way.images))
            case = Case(images=images, edit=self._edit, folder=folder / "work")
            command = way.command(case)
            environment = {**self._environment, **way.environment(case)}
            cost = measure(command, env=environment, phased=way.phased)
            if check and (missing := self._edit.missing_in(images[0], way.disk_format)):
                raise CommandFailedError(f"it left the edit undone: {missing}")
            return cost

    def _fresh(self, folder: Path, way: Way, number: int) -> Path:
        """Return a copy of the image; for many images, an overlay over one shared copy."""
        image = folder / f"vm-{number}.{way.disk_format}"
        if way.images > 1:
            beside = folder / self._base.name  # a backing file elsewhere would be refused
            if not beside.exists():
                beside.hardlink_to(self._base)
            words = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", beside, image]
        else:
            words = ["convert", "-O", way.disk_format, self._base, image]
        subprocess.run(["qemu-img", *map(str, words)], check=True)
        return image


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
