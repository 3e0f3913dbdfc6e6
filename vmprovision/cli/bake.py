"""``vmprovision bake``: golden images from files."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmprovision import errors
from vmprovision.cli.app import (
    SOME_FAILED,
    JsonOption,
    _fail,
    _present,
    _work,
    app,
    stderr,
    stdout,
)
from vmprovision.cli.display import BatchDisplay, OneDisplay
from vmprovision.cli.workflow import fault_commands, summary, wants_annotations
from vmprovision.errors import printable
from vmprovision.host.cache import write_atomically
from vmprovision.junit import TestCase, junit_document

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from rich.console import Console

    from vmprovision.bake import BakeOptions, BakeResult
    from vmprovision.progress import Control

OUTDATED = 4
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
SENTENCES = {
    "baked": "baked",
    "cached": "taken from the cache",
    "current": "nothing to do",
    "outdated": "the output would change",
}


@app.command()
def bake(  # noqa: PLR0913 -- one parameter for each option
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...",
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
        bool, typer.Option("--refresh", help="Bake anew, whatever the cache holds.")
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
    library = _library(as_json)
    if schema:
        typer.echo(library.schema_text(), nl=False)
        return
    if not files:
        raise typer.BadParameter("name at least one bake file", param_hint="FILE")
    options = library.BakeOptions(output=output, check=check, refresh=refresh)
    begun = time.monotonic()
    results = _bake(as_json, files, options, jobs)
    _tell_workflow(results)
    code = _code(results)
    if report_junit is not None:
        document = junit_document(
            "vmprovision bake",
            [_case_of(result) for result in results],
            seconds=time.monotonic() - begun,
        )
        try:
            write_atomically(report_junit.absolute(), document)
        except OSError as exc:
            stderr.print(f"error: {report_junit} cannot be written: {exc.strerror}")
            code = code or errors.VmprovisionError.exit_code
    _present(
        as_json,
        {"results": [_as_json(result) for result in results], "exit_code": code},
        lambda: _show(stdout, results),
    )
    if code:
        raise typer.Exit(code)


def _library(as_json: bool) -> ModuleType:  # noqa: FBT001 -- as the option has it
    """Return the room that bakes; its libraries are an extra."""
    try:
        return importlib.import_module("vmprovision.bake")
    except ModuleNotFoundError as exc:
        _fail(
            as_json,
            errors.BakeFileError(
                f"bake needs the Python package of {exc.name}, which is not installed",
                hint="pip install 'vmprovision[bake]'",
            ),
        )


def _bake(
    as_json: bool,  # noqa: FBT001 -- as the option has it
    files: Sequence[Path],
    options: BakeOptions,
    jobs: int | None,
) -> tuple[BakeResult, ...]:
    """Bake all files, and show where the work stands."""
    library = _library(as_json)

    def find(_: Control) -> tuple[Path, ...]:
        found: tuple[Path, ...] = library.find_bake_files(files)
        return found

    paths = _work(as_json, find)
    several = len(paths) > 1
    display = BatchDisplay(stderr, len(paths)) if several else OneDisplay(stderr)

    def work(control: Control) -> tuple[BakeResult, ...]:
        if not several:
            return (library.bake(paths[0], options, control=control),)
        results: tuple[BakeResult, ...] = library.bake_many(
            paths, options, jobs=jobs, control=control
        )
        return results

    done: tuple[BakeResult, ...] = _work(as_json, work, display)
    return done


def _code(results: Sequence[BakeResult]) -> int:
    """Return the exit code: of the one file, or what became of several."""
    outcomes = {result.outcome for result in results}
    if "cancelled" in outcomes:
        return errors.CancelledError.exit_code
    if len(results) == 1 and results[0].error is not None:
        return results[0].error.exit_code
    if "failed" in outcomes:
        return SOME_FAILED
    return OUTDATED if "outdated" in outcomes else 0


def _as_json(result: BakeResult) -> dict[str, Any]:
    return {**result.as_json(), "exit_code": _code([result])}


def _case_of(result: BakeResult) -> TestCase:
    return TestCase(
        group="vmprovision.bake",
        name=str(result.file),
        seconds=result.seconds,
        output=result.outcome,
        error=result.error if result.outcome in ("failed", "outdated") else None,
        skipped="cancelled" if result.outcome == "cancelled" else "",
    )


def _show(console: Console, results: Sequence[BakeResult]) -> None:
    """Print one line for each bake file, and its images."""
    for result in results:
        if result.error is None:
            console.print(f"{result.file}: {SENTENCES[result.outcome]}: {result.folder}")
        for step in result.steps:
            console.print(f"  {step.name:<9} {step.seconds:6.1f} s")
        _show_error(result)


def _show_error(result: BakeResult) -> None:
    error = result.error
    if error is None:
        return
    if isinstance(error, errors.BakeFileError) and error.problems:
        for number, fault in error.problems:
            stderr.print(f"error: {printable(str(result.file))}:{number}: {fault}")
    else:
        place = f"{result.file}:{result.line}" if result.line else str(result.file)
        stderr.print(f"error: {printable(place)}: {error.message}")
    if error.hint:
        stderr.print(f"  next: {error.hint}")
    if isinstance(error, errors.ProofError):
        for line in error.console:
            stderr.print(f"  console: {line}")


def _tell_workflow(results: Sequence[BakeResult]) -> None:
    """Print annotations and write the job summary, where this is a job of GitHub Actions."""
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
            stderr.print(f"warning: the job summary {path} cannot be written: {exc.strerror}")
