"""Show a bake in a CI system: annotations at lines of files, and a summary.

Both are GitHub's (its "workflow commands" and "job summaries"); Gitea and Forgejo
support them too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vmprovision.errors import BakeFileError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.bake import BakeResult

STEPS = ("fetch", "check", "inject", "verify", "prove", "convert", "describe")


def wants_annotations() -> bool:
    """Return whether the runner of this job understands workflow commands."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def fault_commands(result: BakeResult) -> Iterator[str]:
    """Yield a workflow command for every fault of a bake, at its line of the bake file."""
    error = result.error
    if error is None:
        return
    faults: Sequence[tuple[int | None, str]] = [(result.line, str(error))]
    if isinstance(error, BakeFileError) and error.problems:
        faults = error.problems
    for line, fault in faults:
        place = f"file={_as_property(_relative(result))}"
        if line is not None:
            place += f",line={line}"
        yield f"::error {place},title=vmprovision bake::{_as_message(fault)}"


def _relative(result: BakeResult) -> str:
    """Return the bake file's path in the repository, which annotations need."""
    workspace = os.environ.get("GITHUB_WORKSPACE")
    path = result.file.absolute()
    if workspace and path.is_relative_to(workspace):
        return str(path.relative_to(workspace))
    return str(result.file)


def _as_message(text: str) -> str:
    """Return text as the message of a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _as_property(text: str) -> str:
    """Return text as the value of a property of a workflow command."""
    return _as_message(printable(text)).replace(":", "%3A").replace(",", "%2C")


def summary(results: Sequence[BakeResult]) -> str:
    """Return a summary in Markdown: a table of the bakes with their times, and the faults."""
    head = ["bake file", "outcome", "images", *STEPS, "agent answered", "total"]
    lines = ["## vmprovision bake", "", _row(head), _row(["---"] * len(head))]
    for result in results:
        seconds = {step.name: f"{step.seconds:.1f} s" for step in result.steps}
        lines.append(
            _row(
                [
                    _code(str(result.file)),
                    result.outcome,
                    "<br>".join(_code(name) for name in result.images),
                    *(seconds.get(name, "") for name in STEPS),
                    f"{result.proof} s after power-on" if result.proof is not None else "",
                    f"{result.seconds:.1f} s",
                ]
            )
        )
    for result in results:
        if result.error is not None:
            place = f"{result.file}:{result.line}" if result.line else str(result.file)
            lines += ["", f"**{_escaped(place)}**: {_escaped(str(result.error))}"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    """Return text escaped for Markdown and HTML, whatever it contains."""
    safe = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_{}[]()#+-!|~" else char for char in safe)
