"""Draw samples as SVG lines; only geometry, the templates do the rest."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Point = tuple[float, float]  # seconds since 1970, value

GAP_SECONDS = 35.0  # three missing samples
POINTS = 300  # a chart's width; more points than that are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The ranges of a chart: times from left to right, values from 0 upwards."""

    begin: float
    end: float
    top: float
    width: float
    height: float

    def place(self, point: Point) -> tuple[float, float]:
        """Return the position of a point; a value beyond the axes is drawn at their edge."""
        at, value = point
        share = (at - self.begin) / (self.end - self.begin)
        level = min(max(value / self.top, 0.0), 1.0)
        return share * self.width, (1 - level) * self.height


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line as SVG path data, with its numbers."""

    path: str
    area: str
    latest: float | None
    lowest: float | None
    highest: float | None


def draw(points: Iterable[Point], axes: Axes) -> Line:
    """Return the line through these points, oldest first, with gaps where samples are missing."""
    shown = [point for point in points if axes.begin <= point[0] <= axes.end]
    width = (axes.end - axes.begin) / POINTS
    runs = _runs(_averaged(shown, width), max(GAP_SECONDS, 2.5 * width))
    placed = [[axes.place(point) for point in run] for run in runs]
    values = [value for _, value in shown]
    is_recent = bool(shown) and axes.end - shown[-1][0] <= GAP_SECONDS
    return Line(
        path="".join(_path(run) for run in placed),
        area="".join(_area(run, axes.height) for run in placed),
        latest=values[-1] if is_recent else None,
        lowest=min(values, default=None),
        highest=max(values, default=None),
    )


def _averaged(points: Sequence[Point], width: float) -> list[Point]:
    """Return the average point of each slice of time that has any."""
    if len(points) <= POINTS:
        return list(points)
    found = []
    for _, group in itertools.groupby(points, key=lambda point: point[0] // width):
        members = list(group)
        count = len(members)
        found.append((sum(at for at, _ in members) / count, sum(v for _, v in members) / count))
    return found


def _runs(points: Sequence[Point], gap: float) -> list[list[Point]]:
    """Return the points in groups without a gap."""
    runs: list[list[Point]] = []
    for point in points:
        if not runs or point[0] - runs[-1][-1][0] > gap:
            runs.append([])
        runs[-1].append(point)
    return runs


def _path(run: Sequence[tuple[float, float]]) -> str:
    steps = [f"{x:.1f} {y:.1f}" for x, y in run]
    return f"M{'L'.join(steps)}" if len(steps) > 1 else f"M{steps[0]}h.1"


def _area(run: Sequence[tuple[float, float]], height: float) -> str:
    first, last = run[0][0], run[-1][0]
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in run)
    return f"M{first:.1f} {height:.1f}L{steps}L{last:.1f} {height:.1f}z"


def round_top(highest: float) -> float:
    """Return a round number that is not below a value: 1, 2 or 5 with zeros."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(power * step for step in (1, 2, 5, 10) if highest <= power * step)


def time_ticks(axes: Axes, count: int = 4) -> list[tuple[float, str]]:
    """Return the positions and labels of the ticks on the time axis, in UTC."""
    step = (axes.end - axes.begin) / count
    found = []
    for number in range(count + 1):
        moment = datetime.fromtimestamp(axes.begin + number * step, tz=timezone.utc)
        found.append((number * axes.width / count, f"{moment:%H:%M}"))
    return found
