"""The pages' view of VMs: words, marks and lines, computed from the API's answers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmprovision.server.pages.charts import Axes, Line, draw, round_top, time_ticks
from vmprovision.server.pages.rendering import duration
from vmprovision.server.phases import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from vmprovision.server.models import Sample, Vm

SPARK_SECONDS = 600.0
SPARK_SIZE = (120.0, 28.0)
CHART_SIZE = (330.0, 110.0)
RANGES = {"10m": 600.0, "1h": 3600.0, "6h": 21600.0, "24h": 86400.0}
DEFAULT_RANGE = "1h"

Mark = Literal["good", "busy", "bad", "off", "paused"]
Act = Literal["start", "stop", "pause", "resume"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Badge:
    """A VM's state in one word; its mark differs in shape as well as in colour."""

    word: str
    mark: Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class VmLine:
    """A VM in the list."""

    vm: Vm
    badge: Badge
    reached: int
    cpu: Line
    memory: Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A phase of one VM: done (with time and evidence), in progress, or still to come."""

    name: str
    status: Literal["done", "now", "failed", "pending"]
    at: datetime | None = None
    took: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart with its axes."""

    name: str
    unit: str
    tone: str
    line: Line
    axes: Axes
    times: list[tuple[float, str]]


def badge_of(vm: Vm) -> Badge:
    """Return the badge of a VM."""
    if vm.wanted == "deleted":
        return Badge(word="deleting", mark="busy")
    if vm.state == "failed":
        return Badge(word="silent" if vm.phase == "silent" else "failed", mark="bad")
    if vm.state in ("stopping", "paused"):
        return Badge(word=vm.state, mark="busy" if vm.state == "stopping" else "paused")
    if vm.phase == "ready":
        return Badge(word="ready", mark="good")
    if vm.wanted == "stopped":
        return Badge(word="stopped", mark="off")
    return Badge(word=vm.phase, mark="busy")


def summarize(vms: Iterable[Vm]) -> str:
    """Return how many VMs there are of each kind, in one sentence."""
    words = [badge_of(vm).word for vm in vms]
    if not words:
        return "No virtual machines."
    counts = [f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words))]
    noun = "virtual machine" if len(words) == 1 else "virtual machines"
    return f"{len(words)} {noun}: {', '.join(counts)}."


def lines_of(vms: Iterable[Vm], samples: Mapping[str, Sequence[Sample]]) -> list[VmLine]:
    """Return the VMs for the list, with their last ten minutes."""
    end = _round_end(SPARK_SECONDS)
    width, height = SPARK_SIZE
    axes = Axes(begin=end - SPARK_SECONDS, end=end, top=100.0, width=width, height=height)
    return [
        VmLine(
            vm=vm,
            badge=badge_of(vm),
            reached=PHASES.index(vm.phase) + 1 if vm.phase in PHASES else len(PHASES) - 1,
            cpu=draw(_points(samples.get(vm.id, ()), lambda s: s.cpu_usage_percent), axes),
            memory=draw(_points(samples.get(vm.id, ()), lambda s: s.memory_usage_percent), axes),
        )
        for vm in vms
    ]


def _round_end(seconds: float) -> float:
    """Return the end of a chart's time axis; it moves in steps, so charts stay still in between."""
    step = max(10.0, seconds / 360)
    return (time.time() // step + 1) * step


def _points(
    samples: Iterable[Sample], value: Callable[[Sample], float | None]
) -> list[tuple[float, float]]:
    found = ((sample.recorded_at.timestamp(), value(sample)) for sample in samples)
    return [(at, seen) for at, seen in found if seen is not None]


def charts_of(samples: Sequence[Sample], seconds: float) -> list[Chart]:
    """Return the charts of one VM over a time that ends now."""
    end = _round_end(seconds)
    loads = _points(samples, lambda sample: sample.load_average)
    load_top = round_top(max((value for _, value in loads), default=0.0))
    width, height = CHART_SIZE
    found = []
    for name, unit, tone, top, points in (
        ("CPU", "%", "cpu", 100.0, _points(samples, lambda s: s.cpu_usage_percent)),
        ("Memory", "%", "memory", 100.0, _points(samples, lambda s: s.memory_usage_percent)),
        ("Load", "", "load", load_top, loads),
    ):
        axes = Axes(begin=end - seconds, end=end, top=top, width=width, height=height)
        line, times = draw(points, axes), time_ticks(axes)
        found.append(Chart(name=name, unit=unit, tone=tone, line=line, axes=axes, times=times))
    return found


def steps_of(vm: Vm) -> list[Step]:
    """Return the phases of a VM in order, each with its evidence."""
    silent = vm.phase == "silent"
    shown = (*PHASES[:-1], "silent") if silent else PHASES
    reached = len(shown) - 1 if silent else PHASES.index(vm.phase)
    is_making = not silent and vm.phase != "ready" and vm.state != "failed"
    found, before = [], None
    for number, name in enumerate(shown):
        seen = vm.evidence.get(name) if number <= reached else None
        took = (seen.at - before).total_seconds() if seen and before else -1.0
        found.append(
            Step(
                name=name,
                status=_status(number - reached, vm, is_making=is_making),
                at=seen.at if seen else None,
                took=f"+{duration(took)}" if took >= 0 else "",
                detail=seen.detail if seen else "",
            )
        )
        before = seen.at if seen else before
    return found


def _status(
    distance: int, vm: Vm, *, is_making: bool
) -> Literal["done", "now", "failed", "pending"]:
    """Return the status of a phase, by its distance from the current one."""
    if vm.phase == "silent":
        return "failed" if distance == 0 else "done"
    if distance <= 0:
        return "done"
    if distance > 1 or vm.wanted != "running":
        return "pending"
    return "now" if is_making else "failed"


def acts_of(vm: Vm) -> list[tuple[Act, str]]:
    """Return the actions that a VM allows now, each with its button's label."""
    if vm.wanted == "deleted":
        return []
    found: list[tuple[Act, str]] = []
    if vm.state == "failed":
        found.append(("start", "Try again"))
    elif vm.wanted == "stopped":
        found.append(("start", "Start"))
    if vm.wanted == "paused":
        found.append(("resume", "Resume"))
    elif vm.state == "running" and vm.wanted == "running":
        found.append(("pause", "Pause"))
    if vm.wanted != "stopped" and not (vm.state == "failed" and vm.phase != "silent"):
        found.append(("stop", "Stop"))
    return found
