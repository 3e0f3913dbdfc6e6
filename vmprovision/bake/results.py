"""How bakes are asked for, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.errors import VmprovisionError

BakeOutcome = Literal["baked", "cached", "current", "outdated", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeOptions:
    """How bake files are to be baked.

    Attributes:
        output: where the output folders are made; beside each bake file, if left out.
        check: make nothing; say whether the output would change.
        refresh: bake anew, whatever the cache and the output folder hold.
    """

    output: Path | None = None
    check: bool = False
    refresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a bake, and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeResult:
    """How the bake of one file ended.

    Attributes:
        file: the bake file.
        outcome: ``baked``; ``cached``, taken from the cache; ``current``, the output folder
            already held it; ``outdated``, by ``check``: it does not; ``failed``; ``cancelled``.
        folder: the output folder, if it is known.
        key: of all that the bake is made from, if it is known.
        steps: what was done.
        seconds: all of it.
        proof: of the booted guest's agent: seconds from power-on to its first answer.
        images: the names of the images.
        error: why it failed.
        line: of the bake file that the error is about.
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
