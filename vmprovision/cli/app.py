"""The command line: the only module that prints and exits.

Reports go to standard output, as text or with ``--json`` as one JSON object;
progress, logs and errors go to standard error.  An error's class has its exit code.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

import vmprovision as api
from vmprovision import errors
from vmprovision.appliance.snapshot.host import build_host_appliance, find_host_appliance
from vmprovision.appliance.snapshot.store import SavedAppliance, clear_saved
from vmprovision.cli.display import BatchDisplay, OneDisplay
from vmprovision.cli.junit import junit_xml
from vmprovision.cli.presentation import (
    show_appliance,
    show_batch,
    show_changes,
    show_findings,
    show_guest,
    show_plan,
    show_proof,
    show_runtimes,
    show_service,
    show_verification,
)
from vmprovision.disklayout.keyfile import KeyFile, parse_selector
from vmprovision.doctor import examine_host
from vmprovision.guest.facts import INIT_SYSTEMS
from vmprovision.host.cache import write_atomically
from vmprovision.initsystem import module_for
from vmprovision.planning.injection import render_service
from vmprovision.recipe import build_image, list_recipes
from vmprovision.runtime.archive import build_archive
from vmprovision.runtime.build import build_runtimes
from vmprovision.runtime.choice import WISHES
from vmprovision.runtime.store import (
    ARCHITECTURES,
    Runtime,
    architecture_named,
    find_runtime,
    host_architecture,
    list_runtimes,
    load,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision.cli.display import Display
    from vmprovision.runtime.archive import Archive

log = logging.getLogger(__name__)

SOME_FAILED = 3  # of several images

NAME = "{name}"  # in a VM id: the image's own

app = typer.Typer(
    name="vmprovision",
    help="Put a running guest agent into any Linux disk image, offline: no root, no mounts, "
    "no KVM needed. Afterwards the image is either finished or untouched.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
agent_app = typer.Typer(help="The guest agent by itself.", no_args_is_help=True)
image_app = typer.Typer(
    help="Small bootable guest images, built from recipes.", no_args_is_help=True
)
runtime_app = typer.Typer(
    help="Small interpreters for guests without Python, built from MicroPython's source.",
    no_args_is_help=True,
)
appliance_app = typer.Typer(
    help="The appliance that is booted once on this host and restored for every image.",
    no_args_is_help=True,
)
app.add_typer(agent_app, name="agent")
app.add_typer(image_app, name="image")
app.add_typer(runtime_app, name="runtime")
app.add_typer(appliance_app, name="appliance")

stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

ImageArgument = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGE",
        show_default=False,
        help="A disk image, or a directory that holds an unpacked root filesystem.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="F",
        help="The disk format: raw, qcow2, vmdk, vdi or vhdx. Needed where the file's name and "
        "header do not both say it; raw is never guessed.",
    ),
]
RootOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="The device of the root filesystem, e.g. /dev/sda2, where the image holds several "
        "operating systems.",
    ),
]
BackingOption = Annotated[
    bool,
    typer.Option(
        "--allow-backing",
        help="Follow backing files out of the image's own folder. Only for images you trust.",
    ),
]
RepairOption = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="Let QEMU repair an image whose machine was killed before it had closed it.",
    ),
]
DiskOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--disk",
        metavar="IMAGE",
        help="The guest's next disk, where it lies on several. Can be repeated. All of them are "
        "written to, or none.",
    ),
]
DisksFormatOption = Annotated[
    str | None,
    typer.Option(
        "--disk-format", metavar="F", help="The disk format of each --disk, as --format has it."
    ),
]
KeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="DEVICE:file:PATH",
        help="The file with the key of an encrypted volume: of a device, e.g. /dev/sda2, of a "
        "UUID, or of all. Can be repeated.",
    ),
]
KeyFileOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--key-file",
        metavar="PATH",
        help="The same as --key all:file:PATH.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-redo-log",
        help="Merge a redo log that this user has not made on this host. Only where you know "
        "that it is one of this very image: another one destroys it.",
    ),
]
InitOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The init system, where you know better than the evidence: "
        + ", ".join(INIT_SYSTEMS)
        + ".",
    ),
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        metavar="R",
        help="What runs the agent: guest (a Python of the guest's own), bundled (a runtime that "
        "is put into it), or the path of a static interpreter. auto takes the guest's own, and "
        "the bundled one where there is none.",
    ),
]
VmIdOption = Annotated[
    str | None,
    typer.Option(
        "--vm-id",
        metavar="ID",
        help="The guest's name at its manager; {name} in it stands for the image's name without "
        "its last suffix.",
    ),
]
ManagerOption = Annotated[
    str | None,
    typer.Option(
        "--manager-url",
        metavar="URL",
        help="Where the agent reports its address, e.g. http://192.0.2.1:3000.",
    ),
]
PortOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="The TCP port that the agent listens on; 8080 at first."),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file with the bearer token that the agent shows to the manager. The guest's "
        "configuration is then readable for root only.",
    ),
]
ReadTokenOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file with the bearer token that the agent demands of whoever reads from it.",
    ),
]
ListenOption = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="Where the agent listens: addresses, unix:/PATH, vsock:PORT, separated by commas.",
    ),
]
AllowOption = Annotated[
    str | None,
    typer.Option(
        metavar="NETS",
        help="The addresses and networks that may ask the agent, separated by commas.",
    ),
]
ConfigureOption = Annotated[
    bool | None,
    typer.Option(
        "--allow-configure/--no-allow-configure",
        help="Whether the guest's network may be changed through the agent by whoever has the "
        "token; the agent stays root then.",
        show_default=False,
    ),
]


def run() -> None:
    """Run the command line; the entry point of the ``vmprovision`` program."""
    app()


def _version(value: bool) -> None:  # noqa: FBT001 -- typer's callback
    if value:
        stdout.print(f"vmprovision {api.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Log what is done; twice for every call.",
            show_default=False,
            metavar="",
        ),
    ] = 0,
    _shown: Annotated[  # noqa: FBT002 -- a flag
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logging.basicConfig(
        stream=sys.stderr,
        level=levels[min(verbose, 2)],
        format="%(levelname)s %(name)s: %(message)s",
    )


@app.command()
def inspect(  # noqa: PLR0913 -- one parameter an option
    image: ImageArgument,
    *,
    init: InitOption = None,
    disk_format: FormatOption = None,
    root: RootOption = None,
    allow_backing: BackingOption = False,
    key: KeyOption = None,
    key_file: KeyFileOption = None,
    disk: DiskOption = None,
    disks_format: DisksFormatOption = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show all that speaks for one init system or another, and what came of it.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what the guest is: distribution, architecture, init system, Pythons, agent.

    Nothing is written, nothing of the guest is run.
    """
    source = _source(
        disk_format,
        root,
        allow_backing,
        _keys(as_json, key, key_file),
        disks=disk,
        disks_format=disks_format,
    )
    guest = _work(
        as_json,
        lambda control: api.inspect(
            image, source=source, init=_init(init), explain=explain, control=control
        ),
    )
    _present(as_json, guest.as_json(), lambda: show_guest(stdout, guest))


@app.command()
def plan(  # noqa: PLR0913 -- one parameter an option
    image: ImageArgument,
    *,
    vm_id: VmIdOption = None,
    manager_url: ManagerOption = None,
    port: PortOption = None,
    token_file: TokenOption = None,
    read_token_file: ReadTokenOption = None,
    listen: ListenOption = None,
    allow: AllowOption = None,
    allow_configure: ConfigureOption = None,
    init: InitOption = None,
    runtime: RuntimeOption = "auto",
    disk_format: FormatOption = None,
    root: RootOption = None,
    allow_backing: BackingOption = False,
    key: KeyOption = None,
    key_file: KeyFileOption = None,
    disk: DiskOption = None,
    disks_format: DisksFormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the ordered operations that inject would make; write nothing.

    The same as inject --dry-run. What the guest already has is marked as done.
    """
    options = _inject_options(
        vm_id=vm_id,
        manager_url=manager_url,
        port=port,
        token_file=token_file,
        read_token_file=read_token_file,
        listen=listen,
        allow=allow,
        allow_configure=allow_configure,
        init=init,
        runtime=runtime,
    )
    _plan(
        image,
        options,
        _source(
            disk_format,
            root,
            allow_backing,
            _keys(as_json, key, key_file),
            disks=disk,
            disks_format=disks_format,
        ),
        as_json,
    )


def _plan(
    image: Path,
    options: Callable[[], api.InjectOptions],
    source: api.ImageOptions,
    as_json: bool,  # noqa: FBT001
) -> None:
    report = _work(
        as_json,
        lambda control: api.plan(image, _named(options(), image), source=source, control=control),
    )
    _present(as_json, report.as_json(), lambda: show_plan(stdout, report))


@app.command()
def inject(  # noqa: PLR0913 -- one parameter an option
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            show_default=False,
            help="Disk images, or directories that hold an unpacked root filesystem.",
        ),
    ],
    *,
    vm_id: VmIdOption = None,
    manager_url: ManagerOption = None,
    port: PortOption = None,
    token_file: TokenOption = None,
    read_token_file: ReadTokenOption = None,
    listen: ListenOption = None,
    allow: AllowOption = None,
    allow_configure: ConfigureOption = None,
    init: InitOption = None,
    runtime: RuntimeOption = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW",
            help="Keep the image and write this new one; its format goes by its name. A "
            "directory gets a new image of the same name for each.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan; the same as plan.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How many images at once; by the cores and the free memory, if left out.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Note in FILE what is done, and skip what it says is done already.",
        ),
    ] = None,
    report_junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the results into FILE as JUnit XML."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Have the work done by the workers of this Dask scheduler, e.g. "
            "tcp://192.0.2.1:8786, which find the images under the same paths.",
        ),
    ] = None,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="Let one appliance work on several images, one after another: faster, and for "
            "images of one owner only.",
        ),
    ] = False,
    disk_format: FormatOption = None,
    root: RootOption = None,
    allow_backing: BackingOption = False,
    repair: RepairOption = False,
    key: KeyOption = None,
    key_file: KeyFileOption = None,
    disk: DiskOption = None,
    disks_format: DisksFormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the agent into the guest, so that it runs from the next boot on.

    The image is afterwards finished, or as it was to the byte. Injecting again
    changes nothing; with another --vm-id it changes the configuration only; a
    newer vmprovision upgrades the agent. What an option does not say stays as
    it is in the guest. Several images are worked on side by side, and none that
    fails stops another.
    """
    options = _inject_options(
        vm_id=vm_id,
        manager_url=manager_url,
        port=port,
        token_file=token_file,
        read_token_file=read_token_file,
        listen=listen,
        allow=allow,
        allow_configure=allow_configure,
        init=init,
        runtime=runtime,
    )
    source = _source(
        disk_format,
        root,
        allow_backing,
        _keys(as_json, key, key_file),
        disks=disk,
        disks_format=disks_format,
        repair=repair,
    )
    of_a_batch = {
        "--jobs": jobs,
        "--resume": resume,
        "--report-junit": report_junit,
        "--scheduler": scheduler,
        "--together": together or None,
    }
    is_batch = len(images) > 1 or any(value is not None for value in of_a_batch.values())
    if dry_run and is_batch:
        _fail(
            as_json,
            errors.PlanError(
                "--dry-run shows the plan of one image",
                hint="run it for each, without " + ", ".join(of_a_batch),
            ),
        )
    if scheduler is not None and jobs is not None:
        _fail(
            as_json,
            errors.PlanError(
                "--jobs is for this host, and with --scheduler its workers do the work",
                hint="leave it out; `dask worker --nthreads N` says how many a worker does",
            ),
        )
    if dry_run:
        _plan(images[0], options, source, as_json)
    elif is_batch:
        work = _BatchWork(
            images=images,
            options=options,
            source=source,
            output=output,
            jobs=jobs,
            journal=resume,
            scheduler=scheduler,
            together=together,
        )
        _inject_batch(work, report_junit, as_json)
    else:
        _inject_one(images[0], options, source, output, as_json)


def _inject_one(
    image: Path,
    options: Callable[[], api.InjectOptions],
    source: api.ImageOptions,
    output: Path | None,
    as_json: bool,  # noqa: FBT001
) -> None:
    new = output / image.name if output is not None and output.is_dir() else output
    report = _work(
        as_json,
        lambda control: api.inject(
            image, _named(options(), image), source=source, output=new, control=control
        ),
    )
    _present(as_json, report.as_json(), lambda: show_changes(stdout, report, done="injected"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchWork:
    """What is to be done with several images, and by whom."""

    images: list[Path]
    options: Callable[[], api.InjectOptions]
    source: api.ImageOptions
    output: Path | None
    jobs: int | None
    journal: Path | None
    scheduler: str | None
    together: bool

    def done(self, control: api.Control) -> api.BatchReport:
        """What became of it."""
        options = self.options()
        with contextlib.ExitStack() as stack:
            executor = None
            if self.scheduler is not None:
                control.step("connecting to the scheduler")
                executor = stack.enter_context(api.connect_scheduler(self.scheduler))
                # it logs tracebacks of its own where a cluster is lost; each image's result says it
                logging.getLogger("distributed").setLevel(logging.CRITICAL)
                logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
            return api.inject_many(
                self.images,
                (lambda image: _named(options, image)) if _has_name(options) else options,
                source=self.source,
                output=self.output,
                jobs=self.jobs,
                together=self.together,
                executor=executor,
                journal=self.journal,
                control=control,
            )


def _inject_batch(work: _BatchWork, junit: Path | None, as_json: bool) -> None:  # noqa: FBT001
    begun = time.monotonic()
    report = _work(as_json, work.done, BatchDisplay(stderr, len(work.images)))
    seconds = time.monotonic() - begun
    code = (
        errors.CancelledError.exit_code
        if report.count("cancelled")
        else 0
        if report.ok
        else SOME_FAILED
    )
    codes = [result.error.exit_code if result.error else 0 for result in report.results]
    if junit is not None:
        try:
            write_atomically(junit.absolute(), junit_xml(report, seconds=seconds))
        except OSError as exc:
            stderr.print(f"error: {junit} cannot be written: {exc.strerror}")
            code = code or errors.VmprovisionError.exit_code
    document = report.as_json()
    for result, own in zip(document["results"], codes, strict=True):
        result["exit_code"] = own
    _present(
        as_json, {**document, "exit_code": code}, lambda: show_batch(stdout, stderr, report, codes)
    )
    if code:
        raise typer.Exit(code)


@app.command()
def verify(  # noqa: PLR0913 -- one parameter an option
    image: ImageArgument,
    *,
    disk_format: FormatOption = None,
    root: RootOption = None,
    allow_backing: BackingOption = False,
    key: KeyOption = None,
    key_file: KeyFileOption = None,
    disk: DiskOption = None,
    disks_format: DisksFormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the guest with the receipt that the injection left in it.

    Lists every path whose content, mode, owner or link differs; exit code 60
    where there is one.
    """
    source = _source(
        disk_format,
        root,
        allow_backing,
        _keys(as_json, key, key_file),
        disks=disk,
        disks_format=disks_format,
    )
    report = _work(as_json, lambda control: api.verify(image, source=source, control=control))
    _present(as_json, report.as_json(), lambda: show_verification(stdout, report))
    if report.mismatches:
        raise typer.Exit(errors.VerificationError.exit_code)


@app.command()
def remove(  # noqa: PLR0913 -- one parameter an option
    image: ImageArgument,
    *,
    disk_format: FormatOption = None,
    root: RootOption = None,
    allow_backing: BackingOption = False,
    repair: RepairOption = False,
    key: KeyOption = None,
    key_file: KeyFileOption = None,
    disk: DiskOption = None,
    disks_format: DisksFormatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the agent out again and bring back what stood in its place.

    To the byte, mode and owner, without set-user-ID bits; lines that were added to an
    edited file since stay in it.
    """
    source = _source(
        disk_format,
        root,
        allow_backing,
        _keys(as_json, key, key_file),
        disks=disk,
        disks_format=disks_format,
        repair=repair,
    )
    report = _work(as_json, lambda control: api.remove(image, source=source, control=control))
    _present(as_json, report.as_json(), lambda: show_changes(stdout, report, done="removed"))


@app.command()
def recover(
    image: ImageArgument,
    *,
    disk_format: FormatOption = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Complete or discard what an interrupted injection left beside the image.

    The next inject does the same by itself.
    """
    source = api.ImageOptions(format=disk_format)
    outcome = _work(
        as_json, lambda control: api.recover(image, source=source, control=control, trust=trust)
    )
    sentences = {
        "nothing": "there was nothing to recover",
        "discarded": "an unfinished redo log was discarded; the image is as it was",
        "merged": "a finished redo log was merged; the injection is complete",
    }
    _present(
        as_json,
        {"image": str(image), "outcome": outcome},
        lambda: stdout.print(f"{image}: {sentences[outcome]}"),
    )


@app.command()
def prove(  # noqa: PLR0913 -- one parameter an option
    image: ImageArgument,
    *,
    kernel: Annotated[
        Path | None,
        typer.Option(help="A kernel for an image that has neither boot loader nor kernel."),
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option(help="The initrd that belongs to --kernel.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", help="Seconds for the whole boot and all checks.")
    ] = 300.0,
    disk_format: FormatOption = None,
    root: RootOption = None,
    allow_backing: BackingOption = False,
    key: KeyOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Boot a throwaway copy of the image and check the agent from outside.

    QEMU boots it without any network but this host's loopback. Health, metrics,
    the IP report to a manager that this command plays, and the init system are
    checked. The image is not written to.
    """
    source = _source(disk_format, root, allow_backing, _keys(as_json, key, key_file))
    options = api.ProofOptions(kernel=kernel, initrd=initrd, timeout=timeout)
    report = _work(
        as_json, lambda control: api.prove(image, options, source=source, control=control)
    )
    _present(as_json, report.as_json(), lambda: show_proof(stdout, report))


@app.command()
def render(
    init: Annotated[
        str, typer.Argument(metavar="INIT", help="One of " + ", ".join(INIT_SYSTEMS) + ".")
    ],
    *,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the files that an init system would get."""
    operations = _work(as_json, lambda _: render_service(init, port))
    document = {
        "init": init,
        "files": [
            {"path": str(operation.path), "content": content.decode()}
            for operation, content in operations
        ],
    }
    _present(as_json, document, lambda: show_service(stdout, operations))


@app.command()
def doctor(*, as_json: JsonOption = False) -> None:
    """Check whether this host can do the work; name the command that mends what is missing."""
    findings = _work(as_json, lambda _: examine_host())
    _present(
        as_json,
        {
            "ok": all(finding.ok or not finding.needed for finding in findings),
            "findings": [finding.as_json() for finding in findings],
        },
        lambda: show_findings(stdout, findings),
    )
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(errors.VmprovisionError.exit_code)


@agent_app.command("build")
def agent_build(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")
    ] = Path("guest-agent"),
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH",
            help="Put the bundled runtime for ARCH into the file: it then runs on any Linux of "
            "that architecture, with or without Python.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the agent as one file, to copy into a machine and run there.

    The file finds a Python by itself, or needs none; the same source gives the same bytes.
    """

    def built(_: api.Control) -> Archive:
        return build_archive(
            load(find_runtime(architecture_named(runtime))) if runtime is not None else None
        )

    archive = _work(as_json, built)
    try:
        write_atomically(output.absolute(), archive.content)
        output.chmod(0o755)
    except OSError as exc:
        _fail(as_json, errors.ImageError(f"{output} cannot be written: {exc.strerror}"))
    document = {
        "path": str(output),
        "version": archive.version,
        "size": len(archive.content),
        "sha256": archive.sha256,
    }
    _present(
        as_json,
        document,
        lambda: stdout.print(f"{output}: agent {archive.version}, {len(archive.content)} bytes"),
    )


RecipesOption = Annotated[
    Path | None,
    typer.Option("--recipes", metavar="DIR", help="Recipes of your own, a folder for each."),
]


@image_app.command("list")
def image_list(*, recipes_in: RecipesOption = None, as_json: JsonOption = False) -> None:
    """List the recipes."""
    recipes = _work(as_json, lambda _: list_recipes(recipes_in))
    _present(
        as_json,
        {"recipes": [{"name": r.name, "description": r.description} for r in recipes]},
        lambda: stdout.print("\n".join(f"{r.name:<24} {r.description}" for r in recipes)),
    )


@image_app.command("build")
def image_build(  # noqa: PLR0913 -- one parameter for each option
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe, as list names it.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write a copy here."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Build anew, whatever the cache holds.")
    ] = False,
    tarball: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The root filesystem that the recipe names, or the folder that it is in.",
        ),
    ] = None,
    recipes_in: RecipesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build a small bootable image from a recipe, without mounts; a second time from the cache."""
    path = _work(
        as_json,
        lambda control: build_image(
            name,
            output=output,
            refresh=refresh,
            control=control,
            recipes=recipes_in,
            tarball=tarball,
        ),
    )
    _present(as_json, {"name": name, "path": str(path)}, lambda: stdout.print(str(path)))


@appliance_app.command("build")
def appliance_build(*, as_json: JsonOption = False) -> None:
    """Boot the appliance and save it now, in place of the one that is there.

    The first command that opens an image does the same by itself, if there is none.
    """

    def built(control: api.Control) -> SavedAppliance:
        return build_host_appliance(control)

    saved = _work(as_json, built)
    _present(as_json, saved.as_json(), lambda: show_appliance(stdout, saved))


@appliance_app.command("status")
def appliance_status(*, as_json: JsonOption = False) -> None:
    """Say whether there is a saved appliance that fits this host, where, and how large it is."""
    saved = _work(as_json, lambda _: find_host_appliance())
    document = {"saved": saved.as_json() if saved else None}
    _present(as_json, document, lambda: show_appliance(stdout, saved))


@appliance_app.command("clear")
def appliance_clear(*, as_json: JsonOption = False) -> None:
    """Remove every saved appliance of this user; the next command that needs one makes it."""
    count = _work(as_json, lambda _: clear_saved())
    _present(as_json, {"removed": count}, lambda: stdout.print(f"{count} saved appliances removed"))


@runtime_app.command("build")
def runtime_build(
    architectures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ARCH]...",
            show_default=False,
            help="all, or of: " + ", ".join(ARCHITECTURES) + ". This host's, if left out.",
        ),
    ] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The tarball of the source, instead of fetching it with apt."
        ),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Build anew what is there already.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build runtimes from MicroPython's source as Debian has it; a second time from the cache.

    This host's takes Debian's packages gcc, libc6-dev, make and musl-tools, the
    others the ziglang wheel.
    """
    wanted = architectures or [host_architecture()]

    def built(control: api.Control) -> tuple[Runtime, ...]:
        names = ARCHITECTURES if "all" in wanted else [architecture_named(a) for a in wanted]
        return build_runtimes(names, source=source, refresh=refresh, control=control)

    _present_runtimes(as_json, _work(as_json, built))


@runtime_app.command("list")
def runtime_list(*, as_json: JsonOption = False) -> None:
    """List the runtimes that there are."""
    _present_runtimes(as_json, _work(as_json, lambda _: list_runtimes()))


@runtime_app.command("verify")
def runtime_verify(*, as_json: JsonOption = False) -> None:
    """Check every runtime as an injection does: its hash, its architecture, that it runs alone."""

    def verified(_: api.Control) -> tuple[Runtime, ...]:
        runtimes = list_runtimes()
        for runtime in runtimes:
            load(runtime)
        return runtimes

    _present_runtimes(as_json, _work(as_json, verified))


def _present_runtimes(as_json: bool, runtimes: tuple[Runtime, ...]) -> None:  # noqa: FBT001
    document = {"runtimes": [runtime.as_json() for runtime in runtimes]}
    _present(as_json, document, lambda: show_runtimes(stdout, runtimes))


def _source(  # noqa: PLR0913 -- the options of one image
    disk_format: str | None,
    root: str | None,
    allow_backing: bool,  # noqa: FBT001 -- as the option has it
    keys: tuple[KeyFile, ...],
    *,
    repair: bool = False,
    disks: list[Path] | None = None,
    disks_format: str | None = None,
) -> api.ImageOptions:
    return api.ImageOptions(
        format=disk_format,
        root=root,
        allow_backing=allow_backing,
        keys=keys,
        disks=tuple(disks or ()),
        disks_format=disks_format,
        repair=repair,
    )


def _keys(
    as_json: bool,  # noqa: FBT001
    selectors: list[str] | None,
    files: list[Path] | None,
) -> tuple[KeyFile, ...]:
    """The key files that --key and --key-file name."""
    try:
        named = [parse_selector(selector) for selector in selectors or ()]
    except errors.PlanError as exc:
        _fail(as_json, exc)
    return (*named, *(KeyFile(path=path) for path in files or ()))


def _inject_options(  # noqa: PLR0913 -- one parameter an option
    *,
    vm_id: str | None,
    manager_url: str | None,
    port: int | None,
    token_file: Path | None,
    read_token_file: Path | None,
    listen: str | None,
    allow: str | None,
    allow_configure: bool | None,
    init: str | None,
    runtime: str,
) -> Callable[[], api.InjectOptions]:
    """What makes the options of the command line into those of the library, or raises."""
    return lambda: api.InjectOptions(
        vm_id=vm_id,
        manager_url=manager_url,
        port=port,
        token=_read_token(token_file),
        read_token=_read_token(read_token_file),
        listen=listen,
        allow=allow,
        allow_configure=allow_configure,
        init=_init(init),
        runtime=_runtime(runtime),
    )


def _named(options: api.InjectOptions, image: Path) -> api.InjectOptions:
    """The options for this image: its name in place of ``{name}`` in the VM id."""
    if options.vm_id is None or not _has_name(options):
        return options
    path = image if image.name else image.resolve()
    name = path.name if path.is_dir() else path.stem
    return replace(options, vm_id=options.vm_id.replace(NAME, name))


def _has_name(options: api.InjectOptions) -> bool:
    return NAME in (options.vm_id or "")


def _init(name: str | None) -> Any:  # noqa: ANN401 -- checked against the names that there are
    return module_for(name).NAME if name is not None else None


def _runtime(wish: str) -> Any:  # noqa: ANN401 -- as _init
    return wish if wish in WISHES else Path(wish)


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise errors.PlanError(f"the token file {path} cannot be read: {exc}") from exc


def _present(as_json: bool, document: dict[str, Any], show: Callable[[], None]) -> None:  # noqa: FBT001
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    else:
        show()


def _work(
    as_json: bool,  # noqa: FBT001
    job: Callable[[api.Control], Any],
    display: Display | None = None,
) -> Any:  # noqa: ANN401 -- the job's own result
    """The result of a job, done in a thread so that Ctrl-C is heard while libguestfs blocks."""
    shown = display or OneDisplay(stderr)
    control = api.Control(report=shown.report)
    previous = {
        number: signal.signal(number, lambda *_: control.cancelled.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with shown, concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(job, control)
            while not concurrent.futures.wait([future], timeout=0.2).done:
                pass
            return future.result()
    except errors.VmprovisionError as exc:
        _fail(as_json, exc)
    except Exception as exc:
        log.debug("unexpected", exc_info=exc)
        fault = errors.VmprovisionError(
            f"unexpected {type(exc).__name__}: {exc}",
            hint="this is a fault of vmprovision: please report it with the output of -vv",
        )
        _fail(as_json, fault)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(as_json: bool, exc: errors.VmprovisionError) -> NoReturn:  # noqa: FBT001
    stderr.print(f"error: {exc.message}")
    if exc.hint:
        stderr.print(f"  next: {exc.hint}")
    if isinstance(exc, errors.ProofError):
        for line in exc.console:
            stderr.print(f"  console: {line}")
    if as_json:
        sys.stdout.write(json.dumps({"error": exc.as_json(), "exit_code": exc.exit_code}) + "\n")
    elif isinstance(exc, errors.UnsupportedGuestError):
        sys.stdout.write(exc.configuration)  # nothing else goes there: it can be sent into a file
    raise typer.Exit(exc.exit_code)
