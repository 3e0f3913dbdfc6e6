"""Plan an injection or a removal: from facts and options to ordered operations.

Nothing is written here.  The guest is read only to learn what stands at the
paths that the plan is about.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.blocks import marked
from vmprovision.changes.conditions import AbsentCondition
from vmprovision.changes.operations import (
    EditBlock,
    Operation,
    Plan,
    Symlink,
    WriteFile,
    directories_for,
)
from vmprovision.changes.receipt import (
    ABSENT,
    AGENT,
    CONFIGURATION,
    LOGS,
    RECEIPT,
    RUNTIME,
    Entry,
    serialise_receipt,
)
from vmprovision.errors import AmbiguousInitError, PlanError, UnsupportedGuestError
from vmprovision.filesystem.protocol import LinkCircleError
from vmprovision.guest.configuration import (
    DEFAULT_PORT,
    check_allow,
    check_listen,
    check_manager_url,
    check_port,
    check_token,
    check_vm_id,
    parse_configuration,
    port_in,
    update_configuration,
)
from vmprovision.initsystem import definition_of
from vmprovision.initsystem.rendering import Service, render
from vmprovision.planning.restoration import finishing, restorations, survey, with_receipt
from vmprovision.runtime.choice import choose_runtime
from vmprovision.selinux.labelling import AUTORELABEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import GuestInfo, InitSystem, InitVerdict
    from vmprovision.runtime.archive import Archive
    from vmprovision.runtime.choice import RuntimeChoice


SHEPHERD = "shepherd"  # as process 1, of other distributions than Guix System

# distribution -> the file that its configuration takes in, and what that is called
GENERATED = {
    "nixos": ("guest-agent.nix", "the imports of its configuration.nix"),
    "guix": ("guest-agent.scm", "its operating-system declaration"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectOptions:
    """What the caller wants of an injection; None leaves a setting as it is in the guest.

    Attributes:
        vm_id: the guest's name at the manager.
        manager_url: where the agent reports its address: ``http://HOST:PORT``.
        port: the TCP port that the agent listens on, 8080 at first.
        token: the bearer token that the agent shows to the manager, and demands of whoever
            wants to change the guest.
        read_token: the bearer token that the agent demands of whoever wants to read.
        listen: where the agent listens, all addresses at first; several are separated by
            commas: addresses, ``unix:/PATH``, ``vsock:PORT``.
        allow: the addresses and networks that may ask, separated by commas; all at first.
        allow_configure: whether ``POST /configure-interface`` may change the guest's
            network, for which the agent stays root; needs a token.
        init: the init system, where the caller knows better than the evidence.
        runtime: what runs the agent: ``guest`` for a Python of the guest's own, ``bundled``
            for the runtime of vmprovision, the path of a static interpreter; ``auto`` for
            the guest's own where it has one, else the bundled one.
    """

    vm_id: str | None = None
    manager_url: str | None = None
    port: int | None = None
    # in no log, wherever the options are logged
    token: str | None = field(default=None, repr=False)
    read_token: str | None = field(default=None, repr=False)
    listen: str | None = None
    allow: str | None = None
    allow_configure: bool | None = None
    init: InitSystem | None = None
    runtime: RuntimeChoice = "auto"


def plan_injection(
    guest: GuestInfo, reader: GuestReader, archive: Archive, options: InjectOptions
) -> Plan:
    """Return the complete plan that makes this guest run the agent.

    It begins with what is set aside, and restores what an earlier injection put
    where this one puts nothing.  The operation that enables the service is last.

    Args:
        guest: the facts about the guest.
        reader: the guest's files.
        archive: the agent.
        options: what the caller wants.

    Raises:
        PlanError: the options are wrong, the guest holds a newer agent, or it holds
            something at a path of the plan that can be neither kept nor restored.
        UnsupportedGuestError: there is no service for its init system, or nothing
            can run the agent in it.
        AmbiguousInitError: nothing says what runs its services.
        BundledRuntimeError: the runtime is damaged, or not for this guest.
        InspectionError: a path of the plan cannot be read.
    """
    planned = plan_service(guest, archive, options)
    earlier = guest.agent.receipt.paths if guest.agent else ()
    paths = dict.fromkeys([*planned.paths, *earlier])
    if guest.selinux:
        paths |= dict.fromkeys([AUTORELABEL, guest.real_path(RECEIPT)])
    return with_receipt(planned, guest, survey(paths, reader), archive.version)


def plan_service(guest: GuestInfo, archive: Archive, options: InjectOptions) -> Plan:
    """Return what a guest without an earlier injection gets, but for the receipt.

    It follows from the facts alone.

    Raises:
        VmprovisionError: as ``plan_injection``, but for what reading the guest raises.
    """
    refuse_without_service(guest, options)
    runtime = choose_runtime(guest, options.runtime)
    _refuse_downgrade(guest, archive)
    content = _configuration(guest, options)
    settings = parse_configuration(content)
    service = _service(settings)
    secret = "TOKEN" in settings or "READ_TOKEN" in settings
    files: list[Operation] = []
    notes = guest.notes
    if runtime.content is not None:
        files.append(WriteFile(path=RUNTIME, content=runtime.content, mode=0o755))
        notes = (*notes, f"the agent is run by {runtime.name}")
    files += [
        WriteFile(path=AGENT, content=archive.content, mode=0o755),
        WriteFile(path=CONFIGURATION, content=content, mode=0o600 if secret else 0o644),
    ]
    definition = definition_of(str(guest.init.system))
    files += definition.service_operations(service, guest.init)
    located = [replace(operation, path=guest.real_path(operation.path)) for operation in files]
    receipt = guest.real_path(RECEIPT)
    refuse_hidden(guest, [*(operation.path for operation in located), receipt])
    directories: list[Operation] = list(directories_for([*(o.path for o in located), receipt]))
    return Plan(operations=(*directories, *located), notes=notes)


# What the kernel or the init system makes anew at each boot, whatever fstab says.
VOLATILE = tuple(PurePosixPath(path) for path in ("/dev", "/proc", "/run", "/sys", "/tmp"))  # noqa: S108 -- the guest's


def refuse_hidden(guest: GuestInfo, paths: Iterable[PurePosixPath]) -> None:
    """Check that the running guest will see what is written to these paths, free of links.

    Raises:
        UnsupportedGuestError: another filesystem is mounted over one of them, or it is on a
            sealed one.
        LinkCircleError: one leads through a circle of links.
    """
    for path in paths:
        if circle := guest.circles.intersection(path.parents):
            raise LinkCircleError(
                f"guest path {path} cannot be written: {min(circle)} leads through a circle of "
                "links",
                hint="repair the links in the guest",
            )
        if hidden := guest.hidden_by(path):
            raise UnsupportedGuestError(
                f"guest path {path} would be hidden in the running guest: {hidden.sentence}",
                hint=hidden.mount.advice,
            )
        if seal := guest.sealed_by(path):
            raise UnsupportedGuestError(
                f"guest path {path} is on a sealed filesystem, which no change leaves readable: "
                f"{seal.origin}",
                hint="`vmprovision seed` writes nothing to the image",
            )
        volatile = next((each for each in VOLATILE if path.is_relative_to(each)), None)
        if volatile:
            raise UnsupportedGuestError(
                f"guest path {path}, where a link of the guest leads, would be hidden in the "
                f"running guest: {volatile} is made anew at each boot",
                hint=f"replace the link that leads into {volatile} by a directory",
            )


def _service(settings: Mapping[str, str]) -> Service:
    """Return the settings that the init system has to know."""
    configures = settings.get("ALLOW_CONFIGURE") == "yes"
    if configures and "TOKEN" not in settings:
        raise PlanError(
            "nobody may configure interfaces without a token",
            hint="give one with --token-file",
        )
    return Service(
        port=port_in(settings),
        user="root" if configures else "nobody",
        vsock="vsock:" in settings.get("LISTEN", ""),
    )


def refuse_without_service(guest: GuestInfo, options: InjectOptions) -> None:
    """Check that there is a service for what runs services in this guest.

    Raises:
        UnsupportedGuestError: there is none; with what to add to its configuration, where the
            guest is built from one.
        AmbiguousInitError: nothing says what runs its services, or two things do.
    """
    if guest.distribution.id in GENERATED:
        file, where = GENERATED[guest.distribution.id]
        raise UnsupportedGuestError(
            f"the guest is {guest.distribution.product_name}, which builds its /etc and its "
            "services from its own configuration: what is put into the image is lost",
            hint=f"add the printed {file} to {where} and build the image anew",
            configuration=_own_configuration(f"{guest.distribution.id}/{file}.j2", guest, options),
        )
    if guest.init.system is None and guest.init.pid1 == SHEPHERD:
        raise UnsupportedGuestError(
            "the guest's services are run by the GNU Shepherd, whose configuration is a program",
            hint="add the printed service to /etc/shepherd.scm in the guest, and put the agent "
            "there as it says",
            configuration=_own_configuration("shepherd/guest-agent.scm.j2", guest, options),
        )
    if guest.init.system is None:
        _refuse_unknown(guest.init)
    if guest.init.obstacle:
        raise UnsupportedGuestError(
            f"the guest would not start the agent: {guest.init.obstacle}",
            hint="change that in the guest, e.g. by `systemctl --root=DIRECTORY set-default "
            "multi-user.target`; --init systemd puts the agent into multi-user.target all the same",
        )


def _refuse_unknown(verdict: InitVerdict) -> None:
    if verdict.doubt or verdict.pid1 in ("none", "unknown", "script", "shell"):
        known = [hint.speaks_for for hint in verdict.hints or () if hint.kind != "boot"]
        names = ", ".join(dict.fromkeys(known))
        why = verdict.doubt or (
            f"nothing says what runs services in this guest: {'; '.join(verdict.evidence)}"
        )
        seen = f"; it has files of {names}, and `inspect --explain` shows them" if names else ""
        raise AmbiguousInitError(
            why,
            hint="name it with --init, e.g. --init standalone for a guest that runs rc.local"
            + seen,
        )
    raise UnsupportedGuestError(
        f"the guest's services are run by {verdict.pid1}, for which this version has none",
        hint="where the guest runs /etc/rc.local at boot, --init standalone uses that",
    )


def _own_configuration(template: str, guest: GuestInfo, options: InjectOptions) -> str:
    """Return what to add to the configuration that builds such a guest, without any token."""
    settings = parse_configuration(_configuration(guest, options))
    service = replace(_service(settings), user="nobody")
    public = {key: value for key, value in settings.items() if not key.endswith("TOKEN")}
    return render(template, service=service, settings=public).decode()


def _refuse_downgrade(guest: GuestInfo, archive: Archive) -> None:
    if guest.agent and _order(guest.agent.version) > _order(archive.version):
        raise PlanError(
            f"the guest holds agent {guest.agent.version}, newer than this one, {archive.version}",
            hint="use the vmprovision that put it there, or `vmprovision remove` it first",
        )


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def check_options(options: InjectOptions) -> None:
    """Check what needs no guest to be checked.

    Raises:
        PlanError: a setting has a value that cannot be used.
    """
    _changes(options)


def _changes(options: InjectOptions) -> dict[str, str]:
    """Return the settings that the caller changes, by their names in the configuration file."""
    changes: dict[str, str] = {}
    if options.vm_id is not None:
        changes["VM_ID"] = check_vm_id(options.vm_id)
    if options.manager_url is not None:
        changes["MANAGER_URL"] = check_manager_url(options.manager_url)
    if options.port is not None:
        changes["PORT"] = str(check_port(options.port))
    if options.token is not None:
        changes["TOKEN"] = check_token(options.token)
    if options.read_token is not None:
        changes["READ_TOKEN"] = check_token(options.read_token)
    if options.listen is not None:
        changes["LISTEN"] = check_listen(options.listen)
    if options.allow is not None:
        changes["ALLOW"] = check_allow(options.allow)
    if options.allow_configure is not None:
        changes["ALLOW_CONFIGURE"] = "yes" if options.allow_configure else "no"
    return changes


def _configuration(guest: GuestInfo, options: InjectOptions) -> bytes:
    """Return the guest's configuration file with the caller's changes in it."""
    changes = _changes(options)
    if guest.agent and guest.agent.configuration:
        return update_configuration(guest.agent.configuration, changes)
    changes.setdefault("PORT", str(DEFAULT_PORT))
    return render("agent/guest-agent.conf.j2", settings=changes)


def plan_removal(guest: GuestInfo, reader: GuestReader) -> Plan:
    """Return the ordered operations that restore what stood in the guest before; disabling first.

    Args:
        guest: holds the agent to remove.
        reader: the guest's files.

    Raises:
        PlanError: there is no agent, or a file that was set aside is gone.
        InspectionError: a path of the receipt cannot be read.
    """
    if guest.agent is None:
        raise PlanError("the guest holds no agent of ours", hint=f"there is no {RECEIPT} in it")
    found = survey(guest.agent.receipt.paths, reader)
    # what no receipt lists, itself included, comes first in it, and so goes last
    unlisted = [
        Entry(condition=AbsentCondition(path=guest.real_path(path)), before=ABSENT)
        for path in (RECEIPT, *LOGS)
    ]
    entries = [*unlisted, *guest.agent.receipt.entries]
    return Plan(
        operations=(*restorations(entries, found), *finishing(guest.agent)),
        notes=guest.agent.notes,
        intent=serialise_receipt(guest.agent.receipt),
    )


def render_service(init: str, port: int | None = None) -> list[tuple[Operation, bytes]]:
    """Return the operations for an init system, each with the text to show for it.

    Raises:
        PlanError: the init system is not known or the port is none.
    """
    definition = definition_of(init)
    service = Service(port=check_port(port if port is not None else DEFAULT_PORT))
    return [
        (operation, _shown(operation))
        for verdict in definition.without_guest()
        for operation in definition.service_operations(service, verdict)
    ]


def _shown(operation: Operation) -> bytes:
    if isinstance(operation, Symlink):
        return f"-> {operation.target}\n".encode()
    if isinstance(operation, EditBlock):
        return marked(operation.name, operation.content)
    return operation.content if isinstance(operation, WriteFile) else b""
