"""Inject for the server: on this host, or on the workers of its Dask cluster."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from vmprovision.api import NO_OPTIONS, inject
from vmprovision.batch.run import inject_many
from vmprovision.errors import FleetError, PlanError, VmprovisionError
from vmprovision.image.header import named_format
from vmprovision.progress import Control

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.batch.dask import Fleet
    from vmprovision.planning.injection import InjectOptions
    from vmprovision.reports import ChangeReport, ImageOptions, JobResult
    from vmprovision.server.tools import Tools

LOOK_SECONDS = 1.0  # between two looks at the workers of the cluster


class FleetUnreachableError(FleetError):
    """The cluster takes no work now; it may come back."""


def inject_image(
    tools: Tools,
    image: Path,
    options: InjectOptions = NO_OPTIONS,
    *,
    source: ImageOptions,
    output: Path | None = None,
) -> ChangeReport:
    """Inject the agent into an image.

    Args:
        tools: the server's parts.
        image: the image to change.
        options: what to inject.
        source: how to open the image.
        output: keep the image, and write this new one, in a folder of its own.

    Raises:
        FleetUnreachableError: the cluster cannot be used now; the image is unchanged.
        PlanError: a cluster would give the new image the format that the old one's name says.
        VmprovisionError: the injection failed; the image is unchanged.
    """
    if tools.fleet is None:
        return inject(
            image, options, source=source, output=output, pool=tools.pool, control=tools.control
        )
    folder = None
    if output is not None:
        folder = output.parent
        if named_format(image) not in (None, source.format):
            raise PlanError(
                f"{image} is a {source.format} image by another name",
                hint=f"rename it to {image.with_suffix('').name}.{source.format}",
            )
    result = _inject_there(tools.fleet, tools.control, image, options, source, folder)
    if result.error is not None or result.report is None:
        raise result.error or VmprovisionError("the injection returned no report")
    if output is not None:
        (output.parent / image.name).replace(output)
    return result.report


def _inject_there(  # noqa: PLR0913, PLR0917 -- what the batch needs
    fleet: Fleet,
    control: Control,
    image: Path,
    options: InjectOptions,
    source: ImageOptions,
    folder: Path | None,
) -> JobResult:
    """Let the cluster inject into an image; stop waiting when it has no workers any more.

    Dask would wait for another one without an end, and nobody would learn why.

    Raises:
        FleetUnreachableError: the cluster cannot be used now; the image is unchanged.
    """
    try:
        executor = fleet.executor()
    except FleetError as exc:
        raise FleetUnreachableError(exc.message, hint=exc.hint) from exc
    own, ended = Control(report=control.report), threading.Event()
    lost: list[FleetError] = []

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            if error := fleet.lacks_workers():
                lost.append(error)
            if lost or control.cancelled.is_set():
                own.cancelled.set()
                break

    looking = threading.Thread(target=look)
    looking.start()
    try:
        batch = inject_many(
            [image], options, source=source, output=folder, executor=executor, control=own
        )
    finally:
        ended.set()
        looking.join()
    (result,) = batch.results
    if lost and result.outcome == "cancelled":
        raise FleetUnreachableError(lost[0].message, hint=lost[0].hint)
    return result
