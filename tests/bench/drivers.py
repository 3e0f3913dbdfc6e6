"""Calls of the library, measured without their preparation: ``drivers.py NAME IMAGE...``.

Each is a generator.  Up to its first ``yield`` it prepares what a long-lived process has
ready.  The part up to the second ``yield`` is measured.  Then it cleans up.  ``measure``
describes the protocol between the two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import vmprovision
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

READY_SECONDS = 240.0


def library(images: Sequence[Path]) -> Iterator[None]:
    """Call ``inject`` for one image after the other."""
    build_archive()
    yield
    for image in images:
        vmprovision.inject(image)
    yield


def pool(images: Sequence[Path]) -> Iterator[None]:
    """Like ``library``, with an appliance of a pool for each."""
    build_archive()
    with vmprovision.Pool(size=1) as appliances:
        assert appliances.wait_until_ready(READY_SECONDS)
        yield
        for image in images:
            vmprovision.inject(image, pool=appliances)
        yield


DRIVERS: dict[str, Callable[[Sequence[Path]], Iterator[None]]] = {
    "library": library,
    "pool": pool,
}


def main(name: str, *images: str) -> None:
    """Run a driver as ``measure`` expects it."""
    steps = DRIVERS[name]([Path(image) for image in images])
    next(steps)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    next(steps)
    sys.stdout.write("done\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for _ in steps:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
