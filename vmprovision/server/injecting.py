"""Inject for the server: on this host, or on the workers of its Dask cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.api import NO_OPTIONS, inject
from vmprovision.batch.run import inject_many
from vmprovision.errors import FleetError, VmprovisionError

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
        output: keep the image, and write a new one with its name into this folder.

    Raises:
        FleetUnreachableError: nothing was begun, because the cluster cannot be used now.
        VmprovisionError: the injection failed; the image is unchanged.
    """
    if tools.fleet is None:
        new = output / image.name if output is not None else None
        return inject(
            image, options, source=source, output=new, pool=tools.pool, control=tools.control
        )
    try:
        executor = tools.fleet.executor()
    except FleetError as exc:
        raise FleetUnreachableError(exc.message, hint=exc.hint) from exc
    batch = inject_many(
        [image],
        options,
        source=source,
        output=output,
        executor=executor,
        control=tools.control,
    )
    (result,) = batch.results
    if result.error is not None or result.report is None:
        raise result.error or VmprovisionError("the injection returned no report")
    return result.report
