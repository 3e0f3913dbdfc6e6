"""What the archive holds for ``guest-agent install``, and what the agent makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmprovision.agent import install, services
from vmprovision.changes.blocks import insert_block
from vmprovision.changes.operations import EditBlock, Symlink, WriteFile
from vmprovision.guest.facts import InitVerdict
from vmprovision.initsystem import DEFINITIONS
from vmprovision.initsystem.bootscript import block_in_script
from vmprovision.initsystem.rendering import NAME, Service
from vmprovision.runtime.archive import render_services

if TYPE_CHECKING:
    from collections.abc import Collection

    from vmprovision.changes.operations import Operation
    from vmprovision.initsystem.definition import Live

PACKED: dict[str, Any] = {}
exec(render_services(), PACKED)  # noqa: S102 -- the module as it is in the archive
LIVE = {
    f"{definition.name} {variant.dialect}".strip(): (definition, verdict, variant.live)
    for definition in DEFINITIONS
    for variant, verdict in zip(definition.variants, definition.without_guest(), strict=True)
    if variant.live
}


@pytest.fixture(autouse=True)
def packed_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the agent the services that its archive holds."""
    for name in ("CONFIGURATION", "BEGIN", "END", "VARIANTS"):
        monkeypatch.setattr(services, name, PACKED[name])


def test_the_archive_fills_in_what_the_source_leaves_empty() -> None:
    """The module in the source tree and the one in the archive have the same names."""
    assert {name for name in vars(services) if name[0] != "_"} == {
        name for name in PACKED if name[0] != "_"
    }


def test_only_live_variants_are_packed() -> None:
    """Every variant that can be installed in a running system is there, and no other."""
    assert [parts[0] for parts in PACKED["VARIANTS"]] == list(LIVE)


def choose(monkeypatch: pytest.MonkeyPatch, process: str, files: Collection[str]) -> str:
    """Return the variant that the agent chooses for this process 1 and these files."""
    monkeypatch.setattr(install, "_identify_process_1", lambda: process)
    monkeypatch.setattr(install.compat, "exists", lambda path: path in files)
    name: str = install.find_variant().name
    return name


@pytest.mark.parametrize("name", LIVE)
def test_every_packed_variant_can_be_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No earlier variant hides it, whichever process and files of its own a machine has."""
    live = LIVE[name][2]
    for process in live.processes or ("strange",):
        for wanted in files_of(live):
            assert choose(monkeypatch, process, wanted) == name


def files_of(live: Live) -> list[set[str]]:
    """Return sets of files, each of which satisfies all groups."""
    longest = max(map(len, live.files), default=1)
    return [{group[min(n, len(group) - 1)] for group in live.files} for n in range(longest)]


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """S6, and an init of which nothing is known, without an rc.local."""
    for process in ("s6-svscan", "strange"):
        with pytest.raises(install.InstallError, match=f"process 1 is {process}, and there is no"):
            choose(monkeypatch, process, ())


@pytest.mark.parametrize(
    ("process", "files", "expected"),
    [
        # a sysvinit guest that has OpenRC, or Red Hat's folders and Debian's names as links
        ("init", {"/run/openrc", "/etc/init.d", "/etc/rc2.d"}, "openrc runscript"),
        ("init", {"/etc/rc.d/init.d", "/etc/init.d", "/etc/rc2.d"}, "sysv redhat"),
        ("upstart", {"/etc/rc.d/init.d", "/etc/init.d", "/etc/rc2.d"}, "sysv redhat"),
        ("upstart", {"/etc/init.d", "/etc/rc2.d", "/etc/rc.local"}, "upstart"),
        # BusyBox reads no runlevels, and without an inittab only a script
        ("busybox", {"/etc/init.d", "/etc/rc2.d", "/etc/rc.local"}, "standalone"),
        ("runit", {"/run/openrc", "/etc/inittab", "/etc/rc.local"}, "runit usual"),
        ("init", {"/run/systemd/system", "/run/openrc"}, "systemd"),
    ],
)
def test_machines_with_files_of_several_init_systems(
    process: str, files: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 decides, then what it is known to run."""
    assert choose(monkeypatch, process, files) == expected


def parts_of(operation: Operation) -> tuple[str, str, int, bytes | str]:
    """Return an operation as the agent has it."""
    if isinstance(operation, WriteFile):
        return "file", str(operation.path), operation.mode, operation.content
    if isinstance(operation, Symlink):
        return "link", str(operation.path), 0, operation.target
    assert isinstance(operation, EditBlock)
    return "block", str(operation.path), operation.mode, operation.content


@pytest.mark.parametrize("parts", PACKED["VARIANTS"], ids=lambda parts: parts[0])
def test_a_running_system_gets_what_an_image_gets(parts: tuple[Any, ...]) -> None:
    """The packed operations are those that ``inject`` plans for the same variant."""
    definition, verdict, live = LIVE[parts[0]]
    assert isinstance(verdict, InitVerdict)
    expected = [parts_of(each) for each in definition.service_operations(Service(), verdict)]
    assert list(parts[6]) == expected
    # a block goes into a file by which the variant was found
    assert all(path in live.files[-1] for kind, path, _, _ in expected if kind == "block")


LINES = st.sampled_from(
    [
        PACKED["BEGIN"],
        PACKED["END"],
        *(
            b"x",
            b"",
            b"exit 0",
            b"  exit 1",
            b"exit",
            b"exit 0 # done",
            b"exit 1; # x",
            b"exit 1 2",
        ),
    ]
)


@given(st.lists(LINES))
def test_the_agent_edits_a_file_as_an_injection_does(lines: list[bytes]) -> None:
    """Also where somebody has cut a marker: what is not between two of them stays."""
    content = b"".join(line + b"\n" for line in lines)
    path = LIVE["standalone"][1].hook
    assert path
    edit = block_in_script(path, Service(), b"one\ntwo\n")
    edited = install.with_block(content, edit.content)
    assert edited == insert_block(edit, content)
    bare = insert_block(EditBlock(path=path, name=NAME, content=b""), content)
    assert install.with_block(edited, None) == bare
