"""Arguments and options that several commands share, each declared once.

``SourceOptions`` says how to open an image and ``InjectionOptions`` what to put into
it.  A command takes such a class as one parameter; ``grouped_options`` shows Typer an
option for each of its fields.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from vmprovision.errors import PlanError
from vmprovision.guest.names import INIT_SYSTEMS

if TYPE_CHECKING:
    from vmprovision import ImageOptions, InjectOptions
    from vmprovision.guest.names import InitSystem

NAME = "{name}"  # in a VM id: the image's own name

ImageArgument = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGE",
        show_default=False,
        help="A disk image, or a directory that holds an unpacked root filesystem.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
InitOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The init system, if you know better than the evidence: "
        + ", ".join(INIT_SYSTEMS)
        + ".",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="F",
        help="The disk format: raw, qcow2, vmdk, vdi or vhdx. Needed unless the file's name "
        "and header agree on one; raw is never guessed.",
    ),
]
PortOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="The TCP port that the agent listens on; 8080 by default."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How to open an image."""

    panel: ClassVar = "Image"

    disk_format: FormatOption = None
    root: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="The device of the root filesystem, e.g. /dev/sda2, if the image holds several "
            "operating systems.",
        ),
    ] = None
    allow_backing: Annotated[
        bool,
        typer.Option(
            "--allow-backing",
            help="Follow backing files out of the image's own folder. Only for images you trust.",
        ),
    ] = False
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Let QEMU repair an image whose machine was killed before closing it.",
        ),
    ] = False
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="DEVICE:file:PATH",
            help="The file with the key of an encrypted volume: of a device, e.g. /dev/sda2, of a "
            "UUID, or of all. Can be repeated.",
        ),
    ] = None
    key_file: Annotated[
        list[Path] | None,
        typer.Option("--key-file", metavar="PATH", help="The same as --key all:file:PATH."),
    ] = None
    disk: Annotated[
        list[Path] | None,
        typer.Option(
            "--disk",
            metavar="IMAGE",
            help="The guest's next disk, if it has several. Can be repeated. Either all of them "
            "are written to, or none.",
        ),
    ] = None
    disks_format: Annotated[
        str | None,
        typer.Option(
            "--disk-format", metavar="F", help="The disk format of every --disk, as for --format."
        ),
    ] = None

    def image_options(self) -> ImageOptions:
        """Return these options in the library's form.

        Raises:
            PlanError: a ``--key`` has another form.
        """
        from vmprovision import ImageOptions
        from vmprovision.disklayout.keyfile import KeyFile, parse_selector

        return ImageOptions(
            format=self.disk_format,
            root=self.root,
            allow_backing=self.allow_backing,
            repair=self.repair,
            keys=(
                *(parse_selector(selector) for selector in self.key or ()),
                *(KeyFile(path=path) for path in self.key_file or ()),
            ),
            disks=tuple(self.disk or ()),
            disks_format=self.disks_format,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectionOptions:
    """What to put into a guest."""

    panel: ClassVar = "Agent"

    vm_id: Annotated[
        str | None,
        typer.Option(
            "--vm-id",
            metavar="ID",
            help="The guest's name at its manager; {name} in it stands for the image's name "
            "without its last suffix.",
        ),
    ] = None
    manager_url: Annotated[
        str | None,
        typer.Option(
            "--manager-url",
            metavar="URL",
            help="Where the agent reports its address, e.g. http://192.0.2.1:3000.",
        ),
    ] = None
    port: PortOption = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with the bearer token that the agent shows to the manager. Only root "
            "can then read the agent's configuration in the guest.",
        ),
    ] = None
    read_token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with the bearer token that the agent requires from its readers.",
        ),
    ] = None
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Where the agent listens: addresses, unix:/PATH, vsock:PORT, separated by commas.",
        ),
    ] = None
    allow: Annotated[
        str | None,
        typer.Option(
            metavar="NETS",
            help="The addresses and networks that may query the agent, separated by commas.",
        ),
    ] = None
    allow_configure: Annotated[
        bool | None,
        typer.Option(
            "--allow-configure/--no-allow-configure",
            help="Whether the holder of the token may change the guest's network through the "
            "agent, which then keeps running as root.",
            show_default=False,
        ),
    ] = None
    init: InitOption = None
    runtime: Annotated[
        str,
        typer.Option(
            metavar="R",
            help="What runs the agent: guest (the guest's own Python), bundled (a runtime that "
            "is injected with it), or the path of a static interpreter. auto prefers the guest's "
            "own Python and falls back to the bundled runtime.",
        ),
    ] = "auto"

    def inject_options(self) -> InjectOptions:
        """Return these options in the library's form, with ``{name}`` still in the VM id.

        Raises:
            PlanError: the init system is unknown, or a token file cannot be read.
        """
        from vmprovision import InjectOptions
        from vmprovision.runtime.choice import parse_runtime

        return InjectOptions(
            vm_id=self.vm_id,
            manager_url=self.manager_url,
            port=self.port,
            token=_read_token(self.token_file),
            read_token=_read_token(self.read_token_file),
            listen=self.listen,
            allow=self.allow,
            allow_configure=self.allow_configure,
            init=checked_init(self.init),
            runtime=parse_runtime(self.runtime),
        )


def is_named_after_image(options: InjectOptions) -> bool:
    """Return whether the VM id depends on the image's name."""
    return NAME in (options.vm_id or "")


def name_after(options: InjectOptions, image: Path) -> InjectOptions:
    """Return the options for this image, with its name in place of ``{name}``."""
    if options.vm_id is None or not is_named_after_image(options):
        return options
    path = image if image.name else image.resolve()
    name = path.name if path.is_dir() else path.stem
    return dataclasses.replace(options, vm_id=options.vm_id.replace(NAME, name))


def checked_init(name: str | None) -> InitSystem | None:
    """Return the init system of this name.

    Raises:
        PlanError: no init system has this name.
    """
    if name is None:
        return None
    from vmprovision.initsystem import definition_of

    return definition_of(name).name


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise PlanError(f"the token file {path} cannot be read: {exc}") from exc


Command = Callable[..., None]


def grouped_options(*, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Decorate a command so that Typer sees an option for each field of an options class.

    Args:
        without: fields that are not options of this command and keep their defaults.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, Any] = {
            name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
        }
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name in groups:
                parameters += _parameters_of(groups[parameter.name], without)
            else:
                parameters.append(parameter.replace(annotation=hints[parameter.name]))

        @functools.wraps(command)
        def run(**values: Any) -> None:  # noqa: ANN401 -- any option's
            for name, kind in groups.items():
                own = {field.name for field in dataclasses.fields(kind)} & values.keys()
                values[name] = kind(**{field: values.pop(field) for field in own})
            command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # for Typer
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameters_of(kind: Any, without: Collection[str]) -> list[inspect.Parameter]:  # noqa: ANN401 -- a class of options
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_in_panel(hints[field.name], kind.panel),
        )
        for field in dataclasses.fields(kind)
        if field.name not in without
    ]


def _in_panel(hint: Any, panel: str) -> Any:  # noqa: ANN401 -- an annotation
    """Return an option's annotation with the panel in which the help shows it."""
    kind, option = get_args(hint)
    option = copy.copy(option)
    option.rich_help_panel = panel
    return Annotated[kind, option]
