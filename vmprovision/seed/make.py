"""Write the seed of a guest: inspect its image, plan, and turn the plan into data.

The image is opened only for reading. If it cannot be opened, options state the facts
about the guest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

from vmprovision.api import inspect
from vmprovision.changes.operations import MakeDirectory
from vmprovision.changes.receipt import ABSENT, FOLDER, RECEIPT
from vmprovision.errors import ImageError, PlanError, UnsupportedGuestError
from vmprovision.filesystem.protocol import ROOT
from vmprovision.guest.facts import Distribution, GuestInfo, Interpreter
from vmprovision.host.cache import write_atomically
from vmprovision.initsystem import definition_of
from vmprovision.planning.injection import InjectOptions, plan_service
from vmprovision.planning.restoration import with_receipt
from vmprovision.reports import ImageOptions
from vmprovision.runtime.archive import build_archive
from vmprovision.seed import cloudinit, firmware, ignition
from vmprovision.seed.iso import make_iso

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.changes.operations import Operation, Plan
    from vmprovision.progress import Control

SeedKind = Literal["cloud-init", "ignition", "smbios", "credentials"]
SEED_KINDS: tuple[SeedKind, ...] = get_args(SeedKind)
# Init systems whose services are the same in all guests, so that no inspection is needed.
UNSEEN_INITS = ("systemd", "openrc")
CLOUD_PYTHON = PurePosixPath("/usr/bin/python3")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedOptions:
    """The kind of seed to write, and its options.

    Attributes:
        kind: the first-boot program that reads it; or ``smbios`` or ``credentials`` for
            an agent that is already in the image; or None to use the program in the
            image.
        arch: the guest's architecture, as uname(1) names it, if there is no image.
        user_data: a document of the caller for cloud-init to apply too.
        instance_id: cloud-init's ID of the machine; by default the VM id.
    """

    kind: SeedKind | None = None
    arch: str | None = None
    user_data: bytes | None = None
    instance_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedReport:
    """The seed that was written.

    Attributes:
        output: the new file, or the directory with the new files, or None if none was asked for.
        guest: the facts from the image, or from the options.
        paths: the paths that the guest's first-boot program will write.
        strings: the OEM strings, for a seed in the firmware.
    """

    kind: SeedKind
    output: Path | None
    guest: GuestInfo | None = None
    agent_version: str | None = None
    paths: tuple[str, ...] = ()
    strings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``vmprovision seed --json`` prints it."""
        return {
            "kind": self.kind,
            "output": str(self.output) if self.output else None,
            "guest": self.guest.as_json() if self.guest else None,
            "agent_version": self.agent_version,
            "paths": list(self.paths),
            "strings": list(self.strings),
            "notes": list(self.notes),
        }


def parse_kind(name: str | None) -> SeedKind | None:
    """Return the kind of seed for a value of ``--for``.

    Raises:
        PlanError: there is no such kind.
    """
    found = next((kind for kind in SEED_KINDS if kind == name), None)
    if name is not None and found is None:
        raise PlanError(f"there is no seed for {name}", hint=f"--for takes {', '.join(SEED_KINDS)}")
    return found


def make_seed(  # noqa: PLR0913 -- the options of one seed
    image: Path | str | None,
    output: Path | str | None,
    options: InjectOptions | None = None,
    *,
    seed: SeedOptions | None = None,
    source: ImageOptions | None = None,
    control: Control | None = None,
) -> SeedReport:
    """Write data that makes a guest install the agent at its first boot; the image is unchanged.

    Args:
        image: a disk image or directory to inspect, or None if the options are enough.
        output: the new file. For cloud-init a directory that exists gets ``user-data`` and
            ``meta-data`` instead. Strings need none.
        options: the options of an injection.
        seed: the kind of seed.
        source: how to open the image.
        control: progress and cancellation.

    Raises:
        PlanError: the options do not fit, or are not enough.
        UnsupportedGuestError: the guest has no first-boot program that would use the seed.
        ImageError: the output exists already, or cannot be written.
        VmprovisionError: otherwise as ``inspect`` and ``inject``.
    """
    options, seed = options or InjectOptions(), seed or SeedOptions()
    target = Path(output) if output is not None else None
    guest = None
    if image is not None:
        guest = inspect(image, source=source or ImageOptions(), init=options.init, control=control)
    if seed.kind in firmware.PREFIXES:
        return _write_strings(seed.kind, guest, target, options)
    if target is None:
        raise PlanError("a seed is written to a new file", hint="name it with --output FILE")
    kind = _choose_kind(guest, seed.kind)
    if seed.user_data is not None and kind != "cloud-init":
        raise PlanError(f"{kind} takes no user-data", hint="leave out --user-data")
    if guest is None:
        guest = _describe_guest(kind, options, seed.arch)
    version, plan = _plan_seed(guest, options)
    _write(target, _documents(kind, plan.operations, guest, options, seed))
    return SeedReport(
        kind=kind,
        output=target,
        guest=guest,
        agent_version=version,
        paths=tuple(str(path) for path in plan.paths),
        notes=plan.notes,
    )


def _choose_kind(guest: GuestInfo | None, wanted: SeedKind | None) -> SeedKind:
    """Return the first-boot program that the seed is for.

    Raises:
        PlanError: it is unknown.
        UnsupportedGuestError: the guest has none, or another one, or it is disabled.
    """
    if guest is None:
        if wanted is None:
            raise PlanError(
                "the guest's first-boot program is unknown",
                hint="give its image, or --for cloud-init or --for ignition",
            )
        return wanted
    ready = [each.program for each in guest.first_boot if not each.obstacle]
    if wanted in ready or (wanted is None and ready):
        return wanted or ready[0]
    why = [each.obstacle for each in guest.first_boot if wanted in (None, each.program)]
    named = wanted or "cloud-init or Ignition"
    raise UnsupportedGuestError(
        f"this guest would read no seed: {why[0] if why else f'it has no {named}'}",
        hint="write to the image with `vmprovision inject`; if the guest does read a seed, "
        "leave out the image and describe the guest with --for, --init and --arch",
    )


def _describe_guest(kind: SeedKind, options: InjectOptions, arch: str | None) -> GuestInfo:
    """Return the facts of a guest without an image, from the options.

    Raises:
        PlanError: the options are not enough.
    """
    init = options.init or ("systemd" if kind == "ignition" else None)
    if init not in UNSEEN_INITS:
        raise PlanError(
            "without an image, --init must name the guest's init system",
            hint=f"{' or '.join(UNSEEN_INITS)}; for others give the image",
        )
    if arch is None and (kind == "ignition" or options.runtime == "bundled"):
        raise PlanError(
            "without an image, --arch must name the architecture of the runtime",
            hint="e.g. --arch x86_64; a guest with Ignition is assumed to have no Python",
        )
    # cloud-init is a Python program itself
    python = Interpreter(path=CLOUD_PYTHON, version=None)
    return GuestInfo(
        distribution=Distribution(id="unknown", product_name="an uninspected guest", version=""),
        arch=arch or "unknown",
        libc="unknown",
        init=definition_of(init).without_guest()[0],
        interpreters=(python,) if kind == "cloud-init" else (),
    )


def _plan_seed(guest: GuestInfo, options: InjectOptions) -> tuple[str, Plan]:
    """Return the agent's version, and the plan for a guest that will carry it out itself.

    A running guest has its own mounts, and labels what it writes.
    """
    if guest.agent is not None:
        raise PlanError(
            f"the guest has agent {guest.agent.version} already",
            hint="give it a name with --for smbios, or `vmprovision remove` it first",
        )
    archive = build_archive()
    running = replace(guest, hidden=(), seals=(), selinux=None)
    plan = plan_service(running, archive, options)
    own = {guest.real_path(FOLDER), FOLDER}
    # the guest's usual directories do not belong in a receipt
    kept = [o for o in plan.operations if not isinstance(o, MakeDirectory) or o.path in own]
    paths = [*(operation.path for operation in kept), guest.real_path(RECEIPT)]
    plan = with_receipt(
        replace(plan, operations=tuple(kept)),
        running,
        dict.fromkeys(paths, ABSENT),
        archive.version,
    )
    notes = (*plan.notes, *_notes_on_seals(guest, plan.operations))
    return archive.version, replace(plan, notes=notes)


def _notes_on_seals(guest: GuestInfo, operations: Sequence[Operation]) -> list[str]:
    """Return notes on what a guest with a sealed root needs for the seed.

    Raises:
        UnsupportedGuestError: a path is in a sealed ``/usr``, which cannot be written
            to.
    """
    for operation in operations:
        seal = guest.sealed_by(operation.path)
        if seal is not None and seal.place == ROOT:
            note = (
                "the guest's root is sealed: its first-boot program can write the agent "
                "only if /etc and /usr/local are writable in the running guest"
            )
            return [note]
        if seal is not None:
            raise UnsupportedGuestError(
                f"guest path {operation.path} cannot be written by the running guest either: "
                f"{seal.place} is sealed ({seal.origin})",
                hint=f"make {operation.path.parent} a link into /var when the image is built",
            )
    return []


def _documents(
    kind: SeedKind,
    operations: tuple[Operation, ...],
    guest: GuestInfo,
    options: InjectOptions,
    seed: SeedOptions,
) -> dict[str, bytes] | bytes:
    if kind == "ignition":
        return ignition.make_configuration(operations, guest.init)
    return cloudinit.make_documents(
        operations,
        guest.init,
        instance_id=seed.instance_id or options.vm_id,
        user_data=seed.user_data,
    )


def _write_strings(
    kind: firmware.StringKind, guest: GuestInfo | None, output: Path | None, options: InjectOptions
) -> SeedReport:
    if guest is not None and guest.agent is None:
        raise PlanError(
            "the guest has no agent that would read them", hint="`vmprovision inject` it first"
        )
    strings = firmware.make_strings(kind, options)
    if output is not None:
        _write(output, "".join(f"{string}\n" for string in strings).encode())
    return SeedReport(kind=kind, output=output, guest=guest, strings=strings)


def _write(output: Path, content: dict[str, bytes] | bytes) -> None:
    """Write a new file, or new files in a directory, with mode 0600: they may hold tokens.

    Raises:
        ImageError: the file exists already, or cannot be written.
    """
    files = {output: content} if isinstance(content, bytes) else {}
    if isinstance(content, dict):
        files = {output / name: text for name, text in content.items()}
        if not output.is_dir():
            files = {output: make_iso(cloudinit.LABEL, content)}
    for path in files:
        if path.exists() or path.is_symlink():
            raise ImageError(f"{path} exists already", hint="delete it, or name another --output")
    try:
        for path, text in files.items():
            write_atomically(path.absolute(), text)
    except OSError as exc:
        raise ImageError(f"{output} cannot be written: {exc.strerror}") from exc
