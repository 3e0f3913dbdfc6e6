"""``inject`` of several images: its options, its results and its exit code."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

import vmprovision as api
from vmprovision.cli.console import STDERR, STDOUT
from vmprovision.cli.options import (
    InjectionOptions,
    SourceOptions,
    is_named_after_image,
    name_after,
)
from vmprovision.cli.running import fail, present, work, write_report
from vmprovision.errors import CancelledError, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision import BatchReport, Control

SOME_FAILED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """The options that make an injection a batch, even of one image."""

    panel: ClassVar = "Several images"

    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many images at once; by default as many as cores and free memory allow.",
        ),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Record finished images in FILE, and skip those that it already lists.",
        ),
    ] = None
    report_junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the results to FILE as JUnit XML."),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Let the workers of this Dask scheduler do the work, e.g. "
            "tcp://192.0.2.1:8786. They must find the images under the same paths.",
        ),
    ] = None
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="Let one appliance work on several images, one after another: faster, but only "
            "for images of one owner.",
        ),
    ] = False

    @property
    def any_given(self) -> bool:
        """Return whether any of them is given."""
        return self != BatchOptions()

    @classmethod
    def flags(cls) -> list[str]:
        """Return the options as they are given on the command line."""
        return ["--" + field.name.replace("_", "-") for field in fields(cls)]


def inject_batch(  # noqa: PLR0913 -- the groups of options of one command
    images: Sequence[Path],
    wanted: InjectionOptions,
    batch: BatchOptions,
    *,
    source: SourceOptions,
    output: Path | None,
    as_json: bool,
) -> None:
    """Inject several images, print how each ended, and exit with the code of the batch."""
    from vmprovision.cli.progress_lines import batch_display
    from vmprovision.cli.text import show_batch

    if batch.scheduler is not None and batch.jobs is not None:
        fail(
            PlanError(
                "--jobs is for this host, but --scheduler leaves the work to its workers",
                hint="leave it out; `dask worker --nthreads N` sets how many images a worker "
                "works on at once",
            ),
            as_json=as_json,
        )

    begun = time.monotonic()
    report = work(
        lambda control: _inject(images, wanted, batch, source, output, control),
        as_json=as_json,
        display=batch_display(len(images)),
    )
    code = _exit_code(report)
    if batch.report_junit is not None:
        written = _write_junit(report, batch.report_junit, time.monotonic() - begun)
        code = code or written
    present(
        {**_with_exit_codes(report), "exit_code": code},
        lambda: show_batch(STDOUT, STDERR, report),
        as_json=as_json,
    )
    if code:
        raise typer.Exit(code)


def _inject(  # noqa: PLR0913, PLR0917 -- as inject_batch
    images: Sequence[Path],
    wanted: InjectionOptions,
    batch: BatchOptions,
    source: SourceOptions,
    output: Path | None,
    control: Control,
) -> BatchReport:
    options = wanted.inject_options()
    with contextlib.ExitStack() as stack:
        executor = None
        if batch.scheduler is not None:
            control.step("connecting to the scheduler")
            executor = stack.enter_context(api.connect_scheduler(batch.scheduler))
            _silence_dask()
        return api.inject_many(
            images,
            (lambda image: name_after(options, image))
            if is_named_after_image(options)
            else options,
            source=source.image_options(),
            output=output,
            jobs=batch.jobs,
            together=batch.together,
            executor=executor,
            journal=batch.resume,
            control=control,
        )


def _silence_dask() -> None:
    """Drop the tracebacks that Dask logs when a cluster is lost: each image's result says it."""
    import logging

    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _exit_code(report: BatchReport) -> int:
    if report.count("cancelled"):
        return CancelledError.exit_code
    return 0 if report.ok else SOME_FAILED


def _write_junit(report: BatchReport, path: Path, seconds: float) -> int:
    """Write the results as JUnit XML; return the exit code."""
    from vmprovision.junit import junit_xml

    return write_report(path, junit_xml(report, seconds=seconds))


def _with_exit_codes(report: BatchReport) -> dict[str, object]:
    document = report.as_json()
    for result, shown in zip(report.results, document["results"], strict=True):
        shown["exit_code"] = result.exit_code
    return document
