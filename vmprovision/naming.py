"""Errors that bear the image's name."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmprovision.errors import VmprovisionError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the image's name before the message of an error that does not bear it."""
    try:
        yield
    except VmprovisionError as exc:
        if path.name not in exc.message:
            exc.message = printable(f"{path}: ") + exc.message
        raise
