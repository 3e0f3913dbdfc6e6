"""Plan an injection or a removal: from facts and options to ordered operations.

Nothing is written here. The guest is read only at the paths of the plan, to learn what
is there now.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from vmprovision.errors import PlanError, UnsupportedGuestError
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
from vmprovision.planning.refusals import refuse_downgrade, refuse_hidden, refuse_unknown_init
from vmprovision.planning.restoration import finishing, restorations, survey, with_receipt
from vmprovision.runtime.choice import choose_runtime
from vmprovision.selinux.labelling import AUTORELABEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import GuestInfo, InitSystem
    from vmprovision.runtime.archive import Archive
    from vmprovision.runtime.choice import RuntimeChoice


SHEPHERD = "shepherd"  # process 1 of a distribution other than Guix System

# distribution -> the printed file, and the part of its configuration that includes it
GENERATED = {
    "nixos": ("guest-agent.nix", "the imports of its configuration.nix"),
    "guix": ("guest-agent.scm", "its operating-system declaration"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectOptions:
    """The caller's settings for an injection; None leaves a setting as it is in the guest.

    Attributes:
        vm_id: the guest's name at the manager.
        manager_url: where the agent reports its address: ``http://HOST:PORT``.
        port: the TCP port of the agent; initially 8080.
        token: the bearer token that the agent shows to the manager, and requires for
            changes of the guest.
        read_token: the bearer token that the agent requires for reading.
        listen: the listen addresses, separated by commas: IP addresses, ``unix:/PATH``,
            ``vsock:PORT``; initially all IP addresses.
        allow: the addresses and networks that may query the agent, separated by commas;
            initially all.
        allow_configure: whether ``POST /configure-interface`` may change the guest's
            network. The agent then stays root, and needs a token.
        init: the init system, which overrides the evidence.
        runtime: what runs the agent: ``guest`` (a Python of the guest), ``bundled``
            (vmprovision's runtime), or the path of a static interpreter; ``auto`` is
            ``guest`` if the guest has one, else ``bundled``.
    """

    vm_id: str | None = None
    manager_url: str | None = None
    port: int | None = None
    # repr=False keeps it out of logs
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

    It first sets files aside, then undoes an earlier injection at paths that this one does
    not write to.  The operation that enables the service is last.

    Args:
        guest: the facts about the guest.
        reader: the guest's files.
        archive: the agent's archive.
        options: the caller's settings.

    Raises:
        PlanError: the options are invalid, the guest has a newer agent, or a path of the plan
            has a file that cannot be restored later.
        UnsupportedGuestError: its init system is not supported, or nothing in it can run the
            agent.
        AmbiguousInitError: its init system is unknown.
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
    """Return the operations for a guest without an earlier injection, without the receipt.

    They follow from the facts alone.

    Raises:
        VmprovisionError: as ``plan_injection``, except for errors of reading the guest.
    """
    refuse_without_service(guest, options)
    runtime = choose_runtime(guest, options.runtime)
    refuse_downgrade(guest, archive)
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


def _service(settings: Mapping[str, str]) -> Service:
    """Return the settings that the service needs."""
    configures = settings.get("ALLOW_CONFIGURE") == "yes"
    if configures and "TOKEN" not in settings:
        raise PlanError(
            "configuring interfaces requires a token",
            hint="give one with --token-file",
        )
    return Service(
        port=port_in(settings),
        user="root" if configures else "nobody",
        vsock="vsock:" in settings.get("LISTEN", ""),
    )


def refuse_without_service(guest: GuestInfo, options: InjectOptions) -> None:
    """Check that the guest's init system is supported.

    Raises:
        UnsupportedGuestError: it is not; the error has the text to add for a guest that
            is built from a configuration.
        AmbiguousInitError: the init system is unknown or in doubt.
    """
    if guest.distribution.id in GENERATED:
        file, where = GENERATED[guest.distribution.id]
        raise UnsupportedGuestError(
            f"the guest is {guest.distribution.product_name}, which builds its /etc "
            "and its services from its own configuration: changes of the image are lost",
            hint=f"add the printed {file} to {where} and build the image again",
            configuration=_own_configuration(f"{guest.distribution.id}/{file}.j2", guest, options),
        )
    if guest.init.system is None and guest.init.pid1 == SHEPHERD:
        raise UnsupportedGuestError(
            "the guest's services are run by the GNU Shepherd, whose configuration is a program",
            hint="add the printed service to /etc/shepherd.scm in the guest, "
            "and install the agent as its comments say",
            configuration=_own_configuration("shepherd/guest-agent.scm.j2", guest, options),
        )
    if guest.init.system is None:
        refuse_unknown_init(guest.init)
    if guest.init.obstacle:
        raise UnsupportedGuestError(
            f"the guest would not start the agent: {guest.init.obstacle}",
            hint="change that in the guest, e.g. by `systemctl --root=DIRECTORY set-default "
            "multi-user.target`; --init systemd uses multi-user.target in any case",
        )


def _own_configuration(template: str, guest: GuestInfo, options: InjectOptions) -> str:
    """Return the text to add to such a guest's configuration, without any token."""
    settings = parse_configuration(_configuration(guest, options))
    service = replace(_service(settings), user="nobody")
    public = {key: value for key, value in settings.items() if not key.endswith("TOKEN")}
    return render(template, service=service, settings=public).decode()


def check_options(options: InjectOptions) -> None:
    """Check the options that can be checked without a guest.

    Raises:
        PlanError: a setting has an invalid value.
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
    """Return the guest's configuration file with the caller's changes."""
    changes = _changes(options)
    if guest.agent and guest.agent.configuration:
        return update_configuration(guest.agent.configuration, changes)
    changes.setdefault("PORT", str(DEFAULT_PORT))
    return render("agent/guest-agent.conf.j2", settings=changes)


def plan_removal(guest: GuestInfo, reader: GuestReader) -> Plan:
    """Return the operations that restore the guest's earlier files; disable the service first.

    Args:
        guest: the facts about the guest.
        reader: the guest's files.

    Raises:
        PlanError: there is no agent, or a file that was set aside is gone.
        InspectionError: a path of the receipt cannot be read.
    """
    if guest.agent is None:
        raise PlanError("the guest has no injected agent", hint=f"there is no {RECEIPT} in it")
    found = survey(guest.agent.receipt.paths, reader)
    # files that no receipt lists, and the receipt itself, go last
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
    """Return the operations for an init system, each with its text for a person.

    Raises:
        PlanError: the init system or the port is invalid.
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
