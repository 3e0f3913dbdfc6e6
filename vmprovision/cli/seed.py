"""The command ``seed``: data from which a guest's own first-boot program installs the agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import vmprovision as api
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import (
    InjectionOptions,
    JsonOption,
    SourceOptions,
    grouped_options,
    name_after,
)
from vmprovision.cli.running import present, work
from vmprovision.errors import PlanError

if TYPE_CHECKING:
    from vmprovision import Control, SeedReport


@grouped_options(without=["repair"])
def seed(  # noqa: PLR0913 -- one parameter for each option or group of them
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE",
            show_default=False,
            help="The guest's disk image or directory, which is only read. Without it, --for, "
            "--init and --arch say what the guest is.",
        ),
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The new file: an ISO image for cloud-init, JSON for Ignition. If it is a "
            "directory, cloud-init's user-data and meta-data go there as files.",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="KIND",
            help="What reads the seed: cloud-init or ignition, by default the one that the image "
            "has; or, for an agent that is in the image already, smbios or credentials: strings "
            "that tell it who it is.",
        ),
    ] = None,
    wanted: InjectionOptions,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH", help="Without an image: the guest's architecture, e.g. x86_64."
        ),
    ] = None,
    user_data: Annotated[
        Path | None,
        typer.Option(
            "--user-data",
            metavar="FILE",
            help="User-data of your own, which cloud-init applies as well.",
        ),
    ] = None,
    instance_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="The machine's id for cloud-init, which applies a seed once for each id; by "
            "default the VM id.",
        ),
    ] = None,
    source: SourceOptions,
    as_json: JsonOption = False,
) -> None:
    """Write data from which the guest's own first-boot program installs the agent.

    The image is not written to: attach the seed to the machine beside it. cloud-init
    reads an ISO image, Ignition a JSON file.
    """
    from vmprovision.cli.text import show_seed

    def made(control: Control) -> SeedReport:
        from vmprovision.runtime.store import architecture_named
        from vmprovision.seed.make import parse_kind

        options = wanted.inject_options()
        return api.make_seed(
            image,
            output,
            name_after(options, image) if image else options,
            seed=api.SeedOptions(
                kind=parse_kind(kind),
                arch=architecture_named(arch) if arch is not None else None,
                user_data=_read(user_data),
                instance_id=instance_id,
            ),
            source=source.image_options(),
            control=control,
        )

    report = work(made, as_json=as_json)
    present(report.as_json(), lambda: show_seed(STDOUT, report), as_json=as_json)


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as exc:
        raise PlanError(f"the user-data {path} cannot be read: {exc.strerror}") from exc
