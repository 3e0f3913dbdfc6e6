"""Commands about the guest in one image: what it is, and the state of its agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import vmprovision as api
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import (
    FormatOption,
    ImageArgument,
    InitOption,
    JsonOption,
    SourceOptions,
    checked_init,
    grouped_options,
)
from vmprovision.cli.running import present, work, work_on
from vmprovision.errors import VerificationError

if TYPE_CHECKING:
    from vmprovision import Control, ProofReport

RECOVERIES = {
    "nothing": "there was nothing to recover",
    "discarded": "an unfinished redo log was discarded; the image is as it was",
    "merged": "a finished redo log was merged; the injection is complete",
}


@grouped_options(without=["repair"])
def inspect(
    image: ImageArgument,
    *,
    init: InitOption = None,
    source: SourceOptions,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show all evidence for one init system or another, and how it was weighed.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what the guest is: distribution, architecture, init system, Pythons, agent.

    Nothing is written, and no program of the guest is run.
    """
    from vmprovision.cli.text import show_guest

    guest = work_on(
        image,
        lambda control, ahead: api.inspect(
            image,
            source=source.image_options(),
            init=checked_init(init),
            explain=explain,
            control=control,
            pool=ahead,
        ),
        as_json=as_json,
    )
    present(guest.as_json(), lambda: show_guest(STDOUT, guest), as_json=as_json)


@grouped_options(without=["repair"])
def verify(image: ImageArgument, *, source: SourceOptions, as_json: JsonOption = False) -> None:
    """Compare the guest with the receipt that the injection left in it.

    Lists every path whose content, mode, owner or link differs; the exit code is
    60 if any does.
    """
    from vmprovision.cli.text import show_verification

    report = work_on(
        image,
        lambda control, ahead: api.verify(
            image, source=source.image_options(), control=control, pool=ahead
        ),
        as_json=as_json,
    )
    present(report.as_json(), lambda: show_verification(STDOUT, report), as_json=as_json)
    if report.mismatches:
        raise typer.Exit(VerificationError.exit_code)


@grouped_options()
def remove(image: ImageArgument, *, source: SourceOptions, as_json: JsonOption = False) -> None:
    """Remove the agent and restore what it had replaced.

    Content, mode and owner are restored, but no set-user-ID bits. In a file whose
    lines were edited, lines that were added later stay.
    """
    from vmprovision.cli.text import show_changes

    report = work_on(
        image,
        lambda control, ahead: api.remove(
            image, source=source.image_options(), control=control, pool=ahead
        ),
        as_json=as_json,
    )
    present(report.as_json(), lambda: show_changes(STDOUT, report, done="removed"), as_json=as_json)


def recover(
    image: ImageArgument,
    *,
    disk_format: FormatOption = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust-redo-log",
            help="Merge a redo log that this user did not make on this host. Only if you know "
            "that it belongs to this very image: any other one destroys it.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Complete or discard what an interrupted injection left beside the image.

    The next inject does this by itself.
    """
    outcome = work(
        lambda control: api.recover(
            image, source=api.ImageOptions(format=disk_format), control=control, trust=trust
        ),
        as_json=as_json,
    )
    present(
        {"image": str(image), "outcome": outcome},
        lambda: STDOUT.print(f"{image}: {RECOVERIES[outcome]}"),
        as_json=as_json,
    )


@grouped_options(without=["repair", "disk", "disks_format"])
def prove(  # noqa: PLR0913 -- one parameter for each option or group of them
    image: ImageArgument,
    *,
    kernel: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A kernel for an image that has neither boot loader nor kernel."
        ),
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The initrd that belongs to --kernel.")
    ] = None,
    firmware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What starts the image's own boot loader: bios or uefi. By default a PC's BIOS "
            "if the image has a boot loader for it, else UEFI.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds for the whole boot and all checks.")
    ] = 300.0,
    source: SourceOptions,
    as_json: JsonOption = False,
) -> None:
    """Boot a throwaway copy of the image and check the agent from outside.

    QEMU boots it with this host's loopback as its only network. The checks cover
    health, metrics, the IP report to a manager that this command plays, and the
    init system. The image is not written to.
    """
    from vmprovision.cli.text import show_proof

    def proven(control: Control) -> ProofReport:
        from vmprovision.proof.bootsource import parse_firmware

        options = api.ProofOptions(
            kernel=kernel, initrd=initrd, firmware=parse_firmware(firmware), timeout=timeout
        )
        return api.prove(image, options, source=source.image_options(), control=control)

    report = work(proven, as_json=as_json)
    present(report.as_json(), lambda: show_proof(STDOUT, report), as_json=as_json)
