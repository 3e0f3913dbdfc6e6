"""The options and the results of bakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.errors import VmprovisionError

BakeOutcome = Literal["baked", "cached", "current", "outdated", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeOptions:
    """The options of a bake.

    Attributes:
        output: the parent of the output folders; by default each bake file's own
            folder.
        check: write nothing; report whether the output would change.
        refresh: bake again, even if the cache or the output folder is up to date.
    """

    output: Path | None = None
    check: bool = False
    refresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a bake, and its duration."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeResult:
    """The result of one bake file.

    Attributes:
        file: the bake file.
        outcome: ``baked``; ``cached`` (taken from the cache); ``current`` (already in the output
            folder); ``outdated`` (with ``check``: not in it); ``failed``; ``cancelled``.
        folder: the output folder, if it is known.
        key: the hash of all inputs of the bake, if known.
        steps: the steps that ran.
        seconds: the total duration.
        proof: seconds from power-on to the first answer of the booted guest's agent.
        images: the names of the images.
        error: why it failed.
        line: the line in the bake file that the error is about.
    """

    file: Path
    outcome: BakeOutcome
    folder: Path | None = None
    key: str | None = None
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0
    proof: float | None = None
    images: tuple[str, ...] = ()
    error: VmprovisionError | None = None
    line: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the result as ``vmprovision bake --json`` prints it."""
        return {
            "file": str(self.file),
            "outcome": self.outcome,
            "folder": str(self.folder) if self.folder else None,
            "key": self.key,
            "steps": {step.name: round(step.seconds, 3) for step in self.steps},
            "seconds": round(self.seconds, 3),
            "proof_seconds": self.proof,
            "images": list(self.images),
            "error": self.error.as_json() if self.error else None,
            "line": self.line,
        }
