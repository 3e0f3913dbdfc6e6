"""``plan`` and ``inject``, the latter for one image or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import vmprovision as api
from vmprovision.cli.batch import BatchOptions, inject_batch
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import (
    ImageArgument,
    InjectionOptions,
    JsonOption,
    SourceOptions,
    grouped_options,
    name_after,
)
from vmprovision.cli.running import fail, present, work_on
from vmprovision.errors import PlanError

if TYPE_CHECKING:
    from vmprovision import ChangeReport, Control, PlanReport
    from vmprovision.appliance.session import Appliances


@grouped_options(without=["repair"])
def plan(
    image: ImageArgument,
    *,
    wanted: InjectionOptions,
    source: SourceOptions,
    as_json: JsonOption = False,
) -> None:
    """Show the ordered operations that inject would make; write nothing.

    The same as inject --dry-run. What the guest already has is marked as done.
    """
    _show_plan(image, wanted, source, as_json=as_json)


def _show_plan(
    image: Path, wanted: InjectionOptions, source: SourceOptions, *, as_json: bool
) -> None:
    from vmprovision.cli.text import show_plan

    def planned(control: Control, ahead: Appliances | None) -> PlanReport:
        options = name_after(wanted.inject_options(), image)
        return api.plan(image, options, source=source.image_options(), control=control, pool=ahead)

    report = work_on(image, planned, as_json=as_json)
    present(report.as_json(), lambda: show_plan(STDOUT, report), as_json=as_json)


@grouped_options()
def inject(  # noqa: PLR0913 -- one parameter for each option or group of them
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE",
            show_default=False,
            help="Disk images, or directories that hold an unpacked root filesystem.",
        ),
    ],
    *,
    wanted: InjectionOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW",
            help="Leave the image as it is and write this new one, whose name decides its format. "
            "If it is a directory, each new image goes there under its old name.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan; the same as plan.")
    ] = False,
    batch: BatchOptions,
    source: SourceOptions,
    as_json: JsonOption = False,
) -> None:
    """Install the agent in the guest, so that it starts at the next boot.

    Afterwards the image is either finished or unchanged to the byte. Injecting
    again changes nothing; another --vm-id changes only the configuration; a newer
    vmprovision upgrades the agent. What no option sets stays as it is in the guest.
    Several images are processed in parallel, and one that fails does not stop the
    others.
    """
    is_batch = len(images) > 1 or batch.any_given
    if dry_run and is_batch:
        fail(
            PlanError(
                "--dry-run shows the plan of one image",
                hint="run it for each image, without " + ", ".join(BatchOptions.flags()),
            ),
            as_json=as_json,
        )
    if dry_run:
        _show_plan(images[0], wanted, source, as_json=as_json)
    elif is_batch:
        inject_batch(images, wanted, batch, source=source, output=output, as_json=as_json)
    else:
        _inject_one(images[0], wanted, source, output, as_json=as_json)


def _inject_one(
    image: Path,
    wanted: InjectionOptions,
    source: SourceOptions,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    from vmprovision.cli.text import show_changes

    new = output / image.name if output is not None and output.is_dir() else output

    def injected(control: Control, ahead: Appliances | None) -> ChangeReport:
        options = name_after(wanted.inject_options(), image)
        return api.inject(
            image, options, source=source.image_options(), output=new, control=control, pool=ahead
        )

    report = work_on(image, injected, as_json=as_json)
    present(
        report.as_json(),
        lambda: show_changes(STDOUT, report, done="injected"),
        as_json=as_json,
    )
