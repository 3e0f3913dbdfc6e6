"""Plans: from facts and options to exact operations, without any guest."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from vmprovision.changes.operations import (
    EditBlock,
    MakeDirectory,
    Plan,
    Symlink,
    WriteFile,
)
from vmprovision.changes.receipt import Receipt
from vmprovision.errors import AmbiguousInitError, PlanError, UnsupportedGuestError
from vmprovision.guest.configuration import port_in
from vmprovision.guest.facts import (
    Distribution,
    GuestInfo,
    InitVerdict,
    InstalledAgent,
    Interpreter,
)
from vmprovision.planning.injection import InjectOptions, plan_service
from vmprovision.runtime.archive import Archive

ARCHIVE = Archive(content=b"#!/bin/sh\n", version="1.2.0")
SYSTEMD = InitVerdict(system="systemd", pid1="systemd", confidence="certain", evidence=("seen",))
RC_LOCAL = InitVerdict(
    system="standalone",
    pid1="script",
    confidence="likely",
    evidence=("seen",),
    hook=PurePosixPath("/etc/rc.local"),
)
INITTAB = InitVerdict(
    system="busybox",
    pid1="busybox",
    confidence="certain",
    evidence=("seen",),
    hook=PurePosixPath("/etc/inittab"),
)
GUEST = GuestInfo(
    distribution=Distribution(id="debian", product_name="Debian 12", version="12"),
    arch="x86_64",
    libc="glibc",
    init=SYSTEMD,
    interpreters=(Interpreter(path=PurePosixPath("/usr/bin/python3"), version="3.11"),),
)


def shape(plan: Plan) -> list[tuple[str, str]]:
    """Return kind and path of each operation, in order."""
    return [(type(o).__name__, str(o.path)) for o in plan.operations]


def file_at(plan: Plan, path: str) -> WriteFile:
    """Return the plan's file at a path."""
    (found,) = [o for o in plan.operations if str(o.path) == path]
    assert isinstance(found, WriteFile)
    return found


def installed(version: str, configuration: bytes) -> InstalledAgent:
    """Return an agent that an earlier injection left, with this configuration."""
    receipt = Receipt(agent_version=version, init="systemd", entries=())
    return InstalledAgent(version=version, receipt=receipt, configuration=configuration)


def test_systemd_guest_gets_exactly_these_operations() -> None:
    """A systemd guest gets agent, settings, unit, preset and last the link that enables it."""
    plan = plan_service(GUEST, ARCHIVE, InjectOptions())
    assert shape(plan) == [
        ("MakeDirectory", "/etc"),
        ("MakeDirectory", "/usr"),
        ("MakeDirectory", "/etc/systemd"),
        ("MakeDirectory", "/usr/local"),
        ("MakeDirectory", "/etc/systemd/system"),
        ("MakeDirectory", "/etc/systemd/system-preset"),
        ("MakeDirectory", "/usr/local/bin"),
        ("MakeDirectory", "/usr/local/lib"),
        ("MakeDirectory", "/etc/systemd/system/multi-user.target.wants"),
        ("MakeDirectory", "/usr/local/lib/guest-agent"),
        ("WriteFile", "/usr/local/bin/guest-agent"),
        ("WriteFile", "/etc/guest-agent.conf"),
        ("WriteFile", "/etc/systemd/system/guest-agent.service"),
        ("WriteFile", "/etc/systemd/system-preset/00-guest-agent.preset"),
        ("Symlink", "/etc/systemd/system/multi-user.target.wants/guest-agent.service"),
    ]
    link = plan.operations[-1]
    assert isinstance(link, Symlink)
    assert link.target == "/etc/systemd/system/guest-agent.service"
    assert file_at(plan, "/usr/local/bin/guest-agent").mode == 0o755
    assert file_at(plan, "/etc/guest-agent.conf").mode == 0o644


@pytest.mark.parametrize("verdict", [SYSTEMD, RC_LOCAL, INITTAB])
def test_the_enabling_operation_is_last(verdict: InitVerdict) -> None:
    """With every init system, the operation that enables the service is last."""
    last = plan_service(replace(GUEST, init=verdict), ARCHIVE, InjectOptions()).operations[-1]
    assert isinstance(last, (Symlink, EditBlock))


def test_rc_local_block_goes_before_the_last_exit_and_makes_it_executable() -> None:
    """An rc.local that is not executable would not be run at all."""
    plan = plan_service(replace(GUEST, init=RC_LOCAL), ARCHIVE, InjectOptions())
    block = plan.operations[-1]
    assert isinstance(block, EditBlock)
    assert (str(block.path), block.before, block.mode) == ("/etc/rc.local", "exit", 0o111)
    assert b"/usr/local/bin/guest-agent" in block.content


def test_busybox_inittab_respawns_the_agent() -> None:
    """BusyBox's init starts the agent again by itself, with no console to block on."""
    plan = plan_service(replace(GUEST, init=INITTAB), ARCHIVE, InjectOptions())
    block = plan.operations[-1]
    assert isinstance(block, EditBlock)
    assert block.content.startswith(b"null::respawn:/usr/local/bin/guest-agent ")
    assert block.mode == 0


def test_paths_follow_the_links_of_the_guest() -> None:
    """A guest whose /usr/local is elsewhere gets the files where they really are."""
    links = {PurePosixPath("/usr/local"): PurePosixPath("/var/usrlocal")}
    plan = plan_service(replace(GUEST, links=links), ARCHIVE, InjectOptions())
    paths = [str(path) for path in plan.paths]
    assert "/var/usrlocal/bin/guest-agent" in paths
    assert not [path for path in paths if path.startswith("/usr/local/")]
    assert MakeDirectory(path=PurePosixPath("/var/usrlocal/lib/guest-agent")) in plan.operations


def test_settings_are_written_and_a_secret_is_for_root_only() -> None:
    """A configuration that holds a token is readable for root and nobody else."""
    options = InjectOptions(
        vm_id="web-1", manager_url="http://192.0.2.1:3000/", port=9000, token="s3cret"
    )
    plan = plan_service(GUEST, ARCHIVE, options)
    configuration = file_at(plan, "/etc/guest-agent.conf")
    lines = [line for line in configuration.content.decode().splitlines() if line[0] != "#"]
    assert lines == [
        "VM_ID=web-1",
        "MANAGER_URL=http://192.0.2.1:3000",
        "PORT=9000",
        "TOKEN=s3cret",
    ]
    assert configuration.mode == 0o600


def test_a_privileged_port_gets_the_one_capability() -> None:
    """The unprivileged service may bind a port below 1024 and nothing more."""
    unit = "/etc/systemd/system/guest-agent.service"
    plain = file_at(plan_service(GUEST, ARCHIVE, InjectOptions()), unit).content
    privileged = file_at(plan_service(GUEST, ARCHIVE, InjectOptions(port=80)), unit).content
    assert b"CAP_NET_BIND_SERVICE" not in plain
    assert b"AmbientCapabilities=CAP_NET_BIND_SERVICE" in privileged


def test_doors_and_access_are_settings() -> None:
    """Each option is a line, and a reader's token makes the file a secret, too."""
    options = InjectOptions(
        read_token="r3ad",
        listen="127.0.0.1, unix:/run/guest-agent/a:0666",
        allow="192.0.2.0/24,::1",
    )
    plan = plan_service(GUEST, ARCHIVE, options)
    configuration = file_at(plan, "/etc/guest-agent.conf")
    lines = configuration.content.decode().splitlines()
    assert "READ_TOKEN=r3ad" in lines
    assert "LISTEN=127.0.0.1,unix:/run/guest-agent/a:0666" in lines
    assert "ALLOW=192.0.2.0/24,::1" in lines
    assert configuration.mode == 0o600


@pytest.mark.parametrize(
    "options",
    [
        InjectOptions(listen="unix:relative"),
        InjectOptions(listen="127.0.0.1/8"),
        InjectOptions(listen="vsock:x"),
        InjectOptions(listen="unix:/a b"),
        InjectOptions(listen="::1,"),
        InjectOptions(allow="10.0.0.0/33"),
        InjectOptions(allow="everybody"),
        InjectOptions(allow=""),
        InjectOptions(read_token="two words"),
    ],
    ids=str,
)
def test_doors_and_access_that_are_none(options: InjectOptions) -> None:
    """A setting that the agent would reject is not written to a guest."""
    with pytest.raises(PlanError):
        plan_service(GUEST, ARCHIVE, options)


def test_only_a_service_that_may_configure_stays_root() -> None:
    """And it takes a token; systemd leaves it a few of root's capabilities."""
    options = InjectOptions(token="t0k3n", allow_configure=True)
    unit = "/etc/systemd/system/guest-agent.service"
    text = file_at(plan_service(GUEST, ARCHIVE, options), unit).content.decode()
    assert "DynamicUser=yes" not in text
    (bounding,) = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", text)
    assert "CAP_NET_ADMIN" in bounding.split()
    assert "CAP_SYS_ADMIN" not in bounding
    script = plan_service(replace(GUEST, init=RC_LOCAL), ARCHIVE, options).operations[-1]
    assert isinstance(script, EditBlock)
    assert b"--user root" in script.content
    with pytest.raises(PlanError, match="token"):
        plan_service(GUEST, ARCHIVE, InjectOptions(allow_configure=True))


def test_vsock_is_allowed_to_those_who_listen_on_it() -> None:
    """The unit's list of address families has it only then."""
    unit = "/etc/systemd/system/guest-agent.service"
    plain = file_at(plan_service(GUEST, ARCHIVE, InjectOptions()), unit).content
    vsock = file_at(plan_service(GUEST, ARCHIVE, InjectOptions(listen="vsock:80")), unit).content
    assert b"AF_VSOCK" not in plain
    assert b"AF_VSOCK\n" in vsock


def test_what_options_leave_open_stays_as_it_is_in_the_guest() -> None:
    """Injecting again with another VM id changes that line and no other."""
    before = b"# mine\nVM_ID=old\nMANAGER_URL=http://192.0.2.1\nEXTRA=1"
    guest = replace(GUEST, agent=installed("1.2.0", before))
    plan = plan_service(guest, ARCHIVE, InjectOptions(vm_id="new"))
    after = file_at(plan, "/etc/guest-agent.conf").content
    assert after == b"# mine\nVM_ID=new\nMANAGER_URL=http://192.0.2.1\nEXTRA=1"
    untouched = plan_service(guest, ARCHIVE, InjectOptions())
    assert file_at(untouched, "/etc/guest-agent.conf").content == before


@pytest.mark.parametrize(
    ("value", "port"), [("81", 81), ("abc", 8080), ("", 8080), ("0", 8080), ("65536", 8080)]
)
def test_a_wrong_port_in_the_guest_is_the_default_one(value: str, port: int) -> None:
    """As the agent itself takes it, so neither a plan nor a proof fails over it."""
    assert port_in({"PORT": value}) == port


def test_a_newer_agent_is_not_downgraded() -> None:
    """Version 1.10 is newer than 1.2, and is left alone."""
    guest = replace(GUEST, agent=installed("1.10.0", b""))
    with pytest.raises(PlanError, match=r"1\.10\.0"):
        plan_service(guest, ARCHIVE, InjectOptions())


@pytest.mark.parametrize("pid1", ["runit", "openrc-init", "upstart", "sysvinit", "busybox"])
def test_an_init_system_without_a_service_is_refused(pid1: str) -> None:
    """An init that is known and not served is an error that names --init, never a guess."""
    verdict = InitVerdict(system=None, pid1=pid1, confidence="certain", evidence=("seen",))
    with pytest.raises(UnsupportedGuestError, match=pid1) as caught:
        plan_service(replace(GUEST, init=verdict), ARCHIVE, InjectOptions())
    assert "--init" in caught.value.hint


def test_a_guest_whose_init_nothing_tells_is_ambiguous() -> None:
    """Without evidence the error says so and names --init."""
    verdict = InitVerdict(system=None, pid1="unknown", confidence="certain", evidence=("odd",))
    with pytest.raises(AmbiguousInitError, match="odd") as caught:
        plan_service(replace(GUEST, init=verdict), ARCHIVE, InjectOptions())
    assert "--init" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.6", True), ("2.7", True), ("3.1", False), ("3.2", True), ("3.14", True), (None, True)],
)
def test_the_guest_needs_a_python_that_the_agent_is_written_for(
    version: str | None,
    usable: bool,  # noqa: FBT001 -- a case of the table above
) -> None:
    """CPython 2.6, 2.7 and 3.2 on run the agent; a guest with older ones only is refused."""
    interpreter = Interpreter(path=PurePosixPath("/usr/bin/python"), version=version)
    guest = replace(GUEST, interpreters=(interpreter,))
    if usable:
        plan_service(guest, ARCHIVE, InjectOptions())
        return
    with pytest.raises(UnsupportedGuestError, match="Python"):
        plan_service(guest, ARCHIVE, InjectOptions(runtime="guest"))


def test_a_guest_without_python_is_refused_with_the_next_step() -> None:
    """Nothing is put into a guest in which it could not run."""
    with pytest.raises(UnsupportedGuestError) as caught:
        plan_service(replace(GUEST, interpreters=()), ARCHIVE, InjectOptions(runtime="guest"))
    assert "python3" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        InjectOptions(vm_id=""),
        InjectOptions(vm_id="a b"),
        InjectOptions(vm_id="x\nTOKEN=y"),
        InjectOptions(vm_id=".."),
        InjectOptions(vm_id="x" * 200),
        InjectOptions(manager_url="ftp://h"),
        InjectOptions(manager_url="http://"),
        InjectOptions(manager_url="http://h:99999"),
        InjectOptions(manager_url="http://h/$(id)"),
        InjectOptions(manager_url="http://h\nPORT=1"),
        InjectOptions(manager_url="http://user:pass@h"),
        InjectOptions(manager_url="http://h?x=1"),
        InjectOptions(port=0),
        InjectOptions(port=65536),
        InjectOptions(token=""),
        InjectOptions(token="a\nb"),
        InjectOptions(token="é"),
    ],
)
def test_options_that_a_configuration_file_cannot_hold_are_refused(options: InjectOptions) -> None:
    """No option can add a line to the configuration or a character that its readers differ on."""
    with pytest.raises(PlanError):
        plan_service(GUEST, ARCHIVE, options)
