"""``vmprovision bake``: golden images from files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmprovision import errors
from vmprovision.cli.console import STDERR, STDOUT
from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import fail, present, show_error, work, write_report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from vmprovision.bake import BakeOptions, BakeResult
    from vmprovision.cli.console import Console

SOME_FAILED = 3
OUTDATED = 4
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
SENTENCES = {
    "baked": "baked",
    "cached": "taken from the cache",
    "current": "nothing to do",
    "outdated": "the output would change",
}


def bake(  # noqa: PLR0913 -- one parameter for each option
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="Bake files, or directories that hold some (*.toml).",
        ),
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where the output folders are made, each named as its bake file; beside the "
            "bake file, if left out.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Make nothing; end with exit code 4 if an output would change."
        ),
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Bake again, even if the cache has the result.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            help="How many bake files at once; by the cores and the free memory, if left out.",
        ),
    ] = None,
    report_junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the results into FILE as JUnit XML."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of bake files for editors.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make golden images as a file says: fetch, check, inject, verify, prove, convert, describe.

    The output folder appears when everything in it is finished. A bake whose
    source, options, agent, runtime and version have not changed comes from the
    cache, after its hashes were checked. In GitHub Actions, errors become
    annotations at their lines, and the results a job summary.
    """
    import time

    library = _library(as_json=as_json)
    if schema:
        typer.echo(library.schema_text(), nl=False)
        return
    if not files:
        raise typer.BadParameter("name at least one bake file", param_hint="FILE")
    options = library.BakeOptions(output=output, check=check, refresh=refresh)
    begun = time.monotonic()
    results = _bake(files, options, jobs, as_json=as_json)
    _inform_workflow(results)
    code = _exit_code(results)
    if report_junit is not None:
        written = write_report(report_junit, _junit(results, time.monotonic() - begun))
        code = code or written
    present(
        {"results": [_as_json(result) for result in results], "exit_code": code},
        lambda: _show(STDOUT, results),
        as_json=as_json,
    )
    if code:
        raise typer.Exit(code)


def _library(*, as_json: bool) -> ModuleType:
    """Return the package that bakes; the libraries that it needs are an extra."""
    from vmprovision.cli.extras import import_extra

    try:
        return import_extra("vmprovision.bake", "bake")
    except errors.PlanError as exc:
        fail(exc, as_json=as_json)


def _bake(
    files: Sequence[Path], options: BakeOptions, jobs: int | None, *, as_json: bool
) -> tuple[BakeResult, ...]:
    """Bake all files, and show the progress."""
    from vmprovision.bake import bake as bake_one
    from vmprovision.bake import bake_many, find_bake_files
    from vmprovision.cli.progress_lines import batch_display

    paths = work(lambda _: find_bake_files(files), as_json=as_json)
    if len(paths) == 1:
        return (
            work(lambda control: bake_one(paths[0], options, control=control), as_json=as_json),
        )
    return work(
        lambda control: bake_many(paths, options, jobs=jobs, control=control),
        as_json=as_json,
        display=batch_display(len(paths)),
    )


def _exit_code(results: Sequence[BakeResult]) -> int:
    """Return the exit code: of the one file, or of several together."""
    outcomes = {result.outcome for result in results}
    if "cancelled" in outcomes:
        return errors.CancelledError.exit_code
    if len(results) == 1 and results[0].error is not None:
        return results[0].error.exit_code
    if "failed" in outcomes:
        return SOME_FAILED
    return OUTDATED if "outdated" in outcomes else 0


def _as_json(result: BakeResult) -> dict[str, Any]:
    return {**result.as_json(), "exit_code": _exit_code([result])}


def _junit(results: Sequence[BakeResult], seconds: float) -> bytes:
    from vmprovision.junit import TestCase, junit_document

    cases = [
        TestCase(
            group="vmprovision.bake",
            name=str(result.file),
            seconds=result.seconds,
            output=result.outcome,
            error=result.error if result.outcome == "failed" else None,
            skipped="cancelled" if result.outcome == "cancelled" else "",
        )
        for result in results
    ]
    return junit_document("vmprovision bake", cases, seconds=seconds)


def _show(console: Console, results: Sequence[BakeResult]) -> None:
    """Print a line for each bake file and each of its steps; errors go to standard error."""
    for result in results:
        if result.error is None:
            console.print(f"{result.file}: {SENTENCES[result.outcome]}: {result.folder}")
        for step in result.steps:
            console.print(f"  {step.name:<9} {step.seconds:6.1f} s")
        if result.error is not None:
            show_error(result.error, *_sentences(result, result.error))


def _sentences(result: BakeResult, error: errors.VmprovisionError) -> list[str]:
    """Return the sentences of an error, each with its line of the bake file."""
    file = errors.printable(str(result.file))
    if isinstance(error, errors.BakeFileError) and error.problems:
        return [f"error: {file}:{line}: {fault}" for line, fault in error.problems]
    line = f":{result.line}" if result.line else ""
    return [f"error: {file}{line}: {error.message}"]


def _inform_workflow(results: Sequence[BakeResult]) -> None:
    """Print annotations and write the job summary, if this is a job of GitHub Actions."""
    import os

    from vmprovision.cli.workflow import fault_commands, summary, wants_annotations

    if wants_annotations():
        for result in results:
            for command in fault_commands(result):
                sys.stderr.write(command + "\n")  # the runner reads both streams
    path = os.environ.get(SUMMARY_VARIABLE)
    if path:
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(summary(results))
        except OSError as exc:
            STDERR.print(f"warning: the job summary {path} cannot be written: {exc.strerror}")
