"""Where the time of an injection goes, step by step: alone, with a pool, and together.

``nox -s bench`` injects into fresh overlays over one image, with a clock around each step
of the straight line, and writes the medians into ``docs/performance.md``.  A step's time
is its own: what it calls and what is a step too is taken off.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import vmprovision
from tests.bench.page import describe_machine, write_between
from tests.conftest import DEBIAN_RECIPE
from vmprovision import api, target
from vmprovision.appliance import roots
from vmprovision.appliance.shared import SharedAppliances
from vmprovision.appliance.snapshot.restore import RestoredAppliance
from vmprovision.image import imageset
from vmprovision.progress import Control
from vmprovision.recipe import build_image
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vmprovision.appliance.session import Appliances

ROUNDS = 15
READY_SECONDS = 240.0
REST = "the rest"
STEPS = {
    "check the image, make a redo log": (imageset, "open_image"),
    "restore the appliance": (RestoredAppliance, "__init__"),
    "attach the disk": (RestoredAppliance, "attach"),
    "read its structures": (roots, "read_contents"),
    "find and mount the guest": (target, "mount_guest"),
    "inspect": (target, "inspect_guest"),
    "plan": (api, "plan_injection"),
    "write": (target, "apply_plan"),
    "verify": (api, "verify_plan"),
    "unmount": (RestoredAppliance, "finish"),
    "end the appliance": (RestoredAppliance, "close"),
    "merge the redo log": (target, "commit_images"),
}
OTHERS = {"unmount": (RestoredAppliance, "detach")}  # the same, if the machine is used again
BEGIN, END = "<!-- bench: breakdown -->", "<!-- /bench: breakdown -->"


class Clock:
    """The time of each step in the thread that has made the clock; other threads do not count."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._thread = threading.get_ident()
        self._inner = [0.0]  # seconds of the steps inside of each running one

    @contextlib.contextmanager
    def running(self, step: str) -> Iterator[None]:
        """Count the time of the block, without that of the steps inside of it."""
        if threading.get_ident() != self._thread:
            yield
            return
        begun = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.monotonic() - begun
            self.spent[step] += whole - self._inner.pop()
            self._inner[-1] += whole

    def around(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with this clock around it; of a context manager, around its start."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 -- as the function
            with self.running(step):
                result = function(*arguments, **options)
            if not isinstance(result, contextlib.AbstractContextManager):
                return result
            return self._opened(step, result)

        return timed

    @contextlib.contextmanager
    def _opened(self, step: str, opened: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            with self.running(step):
                value = stack.enter_context(opened)
            yield value


@contextlib.contextmanager
def clocked() -> Iterator[Clock]:
    """Put a clock around every step."""
    clock, kept = Clock(), {}
    for step, (place, name) in (*STEPS.items(), *OTHERS.items()):
        kept[place, name] = getattr(place, name)
        setattr(place, name, clock.around(step, getattr(place, name)))
    try:
        yield clock
    finally:
        for (place, name), function in kept.items():
            setattr(place, name, function)


def spent_on(image: Path, pool: Appliances | None) -> dict[str, float]:
    """Return the seconds of each step of one injection, and of the rest."""
    with clocked() as clock:
        begun = time.monotonic()
        vmprovision.inject(image, pool=pool)
        whole = time.monotonic() - begun
    return {**clock.spent, REST: whole - sum(clock.spent.values())}


def measure(base: Path, folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return the steps of many injections of each way, the ways in turn."""
    build_archive()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with vmprovision.Pool(size=1) as pool, contextlib.closing(SharedAppliances()) as shared:
        vmprovision.inject(_overlay(base, folder / "first.qcow2"), pool=shared)  # starts its own
        for number in range(rounds):
            for way, appliances in (("alone", None), ("pool", pool), ("together", shared)):
                image = _overlay(base, folder / f"{way}-{number}.qcow2")
                assert pool.wait_until_ready(READY_SECONDS)
                found[way].append(spent_on(image, appliances))
                image.unlink()
    return found


def _overlay(base: Path, path: Path) -> Path:
    words = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, path]
    subprocess.run(["qemu-img", *map(str, words)], check=True)
    return path


def render_table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the medians in Markdown, in milliseconds."""
    lines = [f"| step, ms | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for step in (*STEPS, REST):
        cells = [1000 * median(each.get(step, 0.0) for each in runs) for runs in found.values()]
        lines.append(f"| {step} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    sums = [1000 * median(sum(each.values()) for each in runs) for runs in found.values()]
    lines.append(f"| **all** | {' | '.join(f'**{cell:.0f}**' for cell in sums)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry", action="store_true", help="leave docs/performance.md as it is")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vmprovision-bench-") as name:
        base = Path(name) / "base.qcow2"
        shutil.copy(build_image(DEBIAN_RECIPE, control=Control()), base)
        table = render_table(measure(base, base.parent, asked.rounds))
    sys.stdout.write(table + "\n")
    if not asked.dry:
        write_between(BEGIN, END, f"{describe_machine(asked.rounds)}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
