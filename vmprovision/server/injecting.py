"""Inject for the server: on this host, or on the workers of its Dask cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.api import NO_OPTIONS, inject
from vmprovision.batch.run import inject_many
from vmprovision.errors import FleetError, PlanError, VmprovisionError
from vmprovision.image.header import named_format

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.planning.injection import InjectOptions
    from vmprovision.reports import ChangeReport, ImageOptions
    from vmprovision.server.tools import Tools


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
        FleetUnreachableError: nothing was begun, because the cluster cannot be used now.
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
    try:
        executor = tools.fleet.executor()
    except FleetError as exc:
        raise FleetUnreachableError(exc.message, hint=exc.hint) from exc
    batch = inject_many(
        [image],
        options,
        source=source,
        output=folder,
        executor=executor,
        control=tools.control,
    )
    (result,) = batch.results
    if result.error is not None or result.report is None:
        raise result.error or VmprovisionError("the injection returned no report")
    if output is not None:
        (output.parent / image.name).replace(output)
    return result.report
