"""Which machine an agent takes itself for, where one image serves many."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require_root
from vmprovision.agent import config, identity

from .agents import running_agent
from .interpreters import one_of_each
from .test_process import run_to_end
from .test_pure import Collect

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .interpreters import Interpreter

UUID = "6f0c4a3e-91d2-4b57-8d1e-2c5b7a90e1f3"
SYSTEM = (1, b"\x01\x02\x00\x00" + bytes(16), ("QEMU", "Standard PC"))


def smbios(*structures: tuple[int, bytes, tuple[str, ...]]) -> bytes:
    """Return SMBIOS tables from type, formatted area and strings of each structure."""
    tables = b""
    for handle, (kind, area, strings) in enumerate((*structures, (127, b"", ()))):
        tables += struct.pack("<BBH", kind, 4 + len(area), handle) + area
        tables += b"".join(string.encode() + b"\0" for string in strings) or b"\0"
        tables += b"\0"
    return tables


def oem(*strings: str) -> tuple[int, bytes, tuple[str, ...]]:
    """Return an OEM Strings structure."""
    return 11, bytes([len(strings)]), strings


def write_root(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Return a folder that looks like a guest's root."""
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    (folder / "run").mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


CMDLINE = {"proc/cmdline": "quiet guest_agent.vm_id=no guest_agent.vm_id=by-cmdline\n"}
TABLES = {
    "sys/firmware/dmi/tables/DMI": smbios(
        SYSTEM, oem("x=y", "guest_agent.vm_id=by-smbios", "guest_agent.manager_url=http://[::1]:1")
    )
}
ENTRY = {"sys/firmware/dmi/entries/11-0/raw": smbios(oem("guest_agent.vm_id=by-entry"))}
FW_CFG = {"sys/firmware/qemu_fw_cfg/by_name/opt/guest_agent.vm_id/raw": "by-fw_cfg\0"}
CLOUD_INIT = {"run/cloud-init/.instance-id": "i-0abc\n", "run/cloud-init/enabled": ""}
PRODUCT = {"sys/class/dmi/id/product_uuid": UUID.upper() + "\n"}


def identify(root: Path, text: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return the agent's identity on such a machine with such a configuration, and its log."""
    collect = Collect()
    settings = config.parse_settings(config.parse_pairs(text.encode(), collect), collect)
    known = identity.Identity(str(root), f"{root}/proc", collect)
    known.complete(settings)
    return settings.identity, collect.lines


@pytest.mark.parametrize(
    ("files", "value", "source"),
    [
        ({**CMDLINE, **TABLES, **FW_CFG}, "by-cmdline", "kernel command line"),
        ({**TABLES, **ENTRY, **FW_CFG}, "by-smbios", "SMBIOS OEM string"),
        ({**ENTRY, **FW_CFG}, "by-entry", "SMBIOS OEM string"),
        ({**FW_CFG, **CLOUD_INIT}, "by-fw_cfg", "fw_cfg"),
        ({**CLOUD_INIT, **PRODUCT}, "i-0abc", "cloud-init"),
        (PRODUCT, UUID, "SMBIOS UUID"),
        ({}, None, None),
    ],
)
def test_the_first_source_that_has_a_name_counts(
    tmp_path: Path, files: Mapping[str, bytes | str], value: str | None, source: str | None
) -> None:
    """The order is that of the documentation, and a configured name comes before all."""
    root = write_root(tmp_path, files)
    assert identify(root)[0]["vm_id"] == {"value": value, "source": source}
    configured = {"value": "mine", "source": "configuration"}
    assert identify(root, "VM_ID=mine")[0]["vm_id"] == configured


def test_each_setting_has_a_source_of_its_own(tmp_path: Path) -> None:
    """The name may come from one place and the manager from another."""
    found, _ = identify(write_root(tmp_path, {**CMDLINE, **TABLES}))
    assert found["manager_url"] == {"value": "http://[::1]:1", "source": "SMBIOS OEM string"}


def test_credentials_come_before_fw_cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their folder stands in the environment that systemd gives its services."""
    (tmp_path / "guest_agent.vm_id").write_text("by-credential\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    found, _ = identify(write_root(tmp_path / "root", FW_CFG))
    assert found["vm_id"] == {"value": "by-credential", "source": "systemd credential"}


@pytest.mark.parametrize("name", ["nocloud", "iid-datasource-none", ""])
def test_names_that_clones_share_are_none(tmp_path: Path, name: str) -> None:
    """cloud-init's name for machines without data is ignored."""
    root = write_root(tmp_path, {**PRODUCT, "run/cloud-init/.instance-id": name})
    assert identify(root)[0]["vm_id"]["source"] == "SMBIOS UUID"


def test_a_machine_that_is_being_named_is_waited_for(tmp_path: Path) -> None:
    """While cloud-init works, the UUID is not taken; once it has ended without a name, it is."""
    root = write_root(tmp_path, {**PRODUCT, "run/cloud-init/enabled": ""})
    assert identify(root)[0]["vm_id"]["value"] is None
    (root / "run/cloud-init/result.json").touch()
    assert identify(root)[0]["vm_id"]["value"] == UUID


@pytest.mark.parametrize(
    "uuid",
    [
        "00000000-0000-0000-0000-000000000000",
        "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        "03000200-0400-0500-0006-000700080009",
        "Not Settable",
        UUID[:-1],
        UUID.replace("-", ""),
        "",
    ],
)
def test_uuids_that_are_none(uuid: str) -> None:
    """Zeros, ones, and what vendors leave in boards name nobody."""
    assert identity.parse_uuid(uuid) is None


@pytest.mark.parametrize(
    "value", ["a\x1bb", "x" * 129, "quote'", 'quo"te', "back\\slash", "\u00fc"], ids=repr
)
def test_hostile_values_are_passed_over(tmp_path: Path, value: str) -> None:
    """An invalid name is logged without its text, and the next source is used."""
    tables = {"sys/firmware/dmi/tables/DMI": smbios(oem("guest_agent.vm_id=" + value))}
    found, lines = identify(write_root(tmp_path, {**tables, **FW_CFG}))
    assert found["vm_id"]["value"] == "by-fw_cfg"
    assert [line for line in lines if "SMBIOS OEM string" in line and "ignored" in line]
    assert not [line for line in lines if value in line]


def test_a_hostile_manager_is_passed_over(tmp_path: Path) -> None:
    """A URL from outside must be one that the configuration could have."""
    root = write_root(tmp_path, {"proc/cmdline": "guest_agent.manager_url=file:///etc/shadow"})
    found, lines = identify(root)
    assert found["manager_url"]["value"] is None
    assert "http://" in lines[0]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('quiet "guest_agent.vm_id=a b" x\n', "a b"),
        ('guest_agent.vm_id="a b" x="y"', "a b"),
        ("guest-agent.vm_id=a", "a"),
        ('guest_agent.vm_id="a', "a"),
        ('"x guest_agent.vm_id=no" guest_agent.vm_id=a', "a"),
        ('x="y guest_agent.vm_id=no z"', None),
        ('guest_agent.vm_id=a"b', None),
        ('guest_agent.vm_id=""', None),
        ("guest_agent.vm_id=a\u00a0b", None),
    ],
)
def test_the_command_line_is_quoted_as_the_kernel_has_it(
    tmp_path: Path, line: str, name: str | None
) -> None:
    """Spaces between double quotes are part of a parameter, around all of it or its value."""
    assert identify(write_root(tmp_path, {"proc/cmdline": line}))[0]["vm_id"]["value"] == name


@pytest.mark.parametrize("name", [b"caf\xe9", "caf\u00e9".encode(), b"a\x7f", b"a\x80\xffb"])
@pytest.mark.parametrize("source", ["cmdline", "smbios", "fw_cfg", "cloud-init"])
def test_bytes_that_are_no_ascii_are_not_made_something_else(
    tmp_path: Path, name: bytes, source: str
) -> None:
    """Such a name is passed over from every source: it would be that of other machines, too."""
    word = b"guest_agent.vm_id=" + name
    files: dict[str, dict[str, bytes | str]] = {
        "cmdline": {"proc/cmdline": b"quiet " + word + b" splash\n"},
        "smbios": {"sys/firmware/dmi/tables/DMI": smbios(oem("x")).replace(b"x", word)},
        "fw_cfg": {next(iter(FW_CFG)): name},
        "cloud-init": {"run/cloud-init/.instance-id": name},
    }
    found, lines = identify(write_root(tmp_path, files[source]))
    assert found["vm_id"]["value"] is None
    assert [line for line in lines if "is not printable ASCII: ignored" in line]


DIMM = (17, bytes(80), ("DIMM 0", "QEMU", "x" * 60))


def test_the_tables_of_much_memory_are_read_whole(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Strings after 64 KiB count, but strings after the end marker do not."""
    tables = smbios(*[DIMM] * 1500, oem("guest_agent.vm_id=far")) + smbios(
        oem("guest_agent.vm_id=stale", "guest_agent.manager_url=http://192.0.2.1:1")
    )
    assert len(tables) > 3 * 65536
    files: dict[str, bytes | str] = {
        "sys/firmware/dmi/tables/DMI": tables,
        "proc/cmdline": '"guest-agent.manager_url=http://[::1]:1" x=" guest_agent.vm_id=no"',
    }
    root = write_root(tmp_path / "root", files)
    with running_agent(interpreter, program, tmp_path, arguments=["--root", str(root)]) as agent:
        found = json.loads(agent.get("/info").body)["identity"]
    assert found == {
        "vm_id": {"value": "far", "source": "SMBIOS OEM string"},
        "manager_url": {"value": "http://[::1]:1", "source": "kernel command line"},
    }


def test_every_cut_of_the_tables_is_survived(tmp_path: Path) -> None:
    """Tables that end anywhere, or whose lengths lie, give what can be read of them."""
    tables = smbios(SYSTEM, oem("a", "b"), oem("c"))

    def strings(content: bytes) -> list[bytes]:
        (tmp_path / "DMI").write_bytes(content)
        found: list[bytes] = identity.oem_strings(str(tmp_path / "DMI"))
        return found

    assert strings(tables) == [b"a", b"b", b"c"]
    for end in range(len(tables)):
        assert set(strings(tables[:end])) <= {b"a", b"b", b"c"}
    for at in range(len(tables)):
        for byte in (0, 1, 255):
            strings(tables[:at] + bytes([byte]) + tables[at + 1 :])
    assert strings(b"\x0b\x05\0\0\1" + b"x" * 10_000_000) == []


@pytest.mark.parametrize("interpreter", one_of_each(), indirect=True)
def test_what_only_root_may_read_is_handed_over(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """`identify` writes an EnvironmentFile, by which an agent that may not read knows it."""
    root = write_root(tmp_path / "root", {**TABLES, **PRODUCT})
    run = run_to_end(interpreter, program, "identify", "--root", str(root))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    lines = (root / "run/guest-agent.identity").read_text().splitlines()
    assert lines == [
        "GUEST_AGENT_SMBIOS_MANAGER_URL='http://[::1]:1'",
        "GUEST_AGENT_SMBIOS_VM_ID='by-smbios'",
        f"GUEST_AGENT_UUID='{UUID}'",
    ]
    environment = dict(line.replace("'", "").split("=", 1) for line in lines)
    bare = write_root(tmp_path / "bare", {})
    with running_agent(
        *(interpreter, program, tmp_path),
        arguments=["--root", str(bare)],
        environment=environment,
    ) as agent:
        info = json.loads(agent.get("/info").body)
    assert info["vm_id"] == "by-smbios"
    assert info["identity"]["manager_url"]["source"] == "SMBIOS OEM string"


def test_identifying_fails_in_one_line(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Where nothing can be written there is a sentence and status 1, which the unit ignores."""
    run = run_to_end(interpreter, program, "identify", f"--root={tmp_path}/none")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1


def test_every_interpreter_finds_the_same(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """One machine, one name, whatever Python it has; a clone has another one."""
    root = write_root(tmp_path / "root", {**TABLES, **CMDLINE, **PRODUCT})
    arguments = ["--root", str(root)]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        info = json.loads(agent.get("/info").body)
    assert info["vm_id"] == "by-cmdline"
    assert info["identity"] == {
        "vm_id": {"value": "by-cmdline", "source": "kernel command line"},
        "manager_url": {"value": "http://[::1]:1", "source": "SMBIOS OEM string"},
    }


@pytest.mark.parametrize("interpreter", one_of_each()[:1], indirect=True)
def test_root_reads_before_it_becomes_nobody(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """With --user the machine's UUID is known, though the user may not read it."""
    require_root()
    root = write_root(tmp_path / "root", PRODUCT)
    (root / "sys/class/dmi/id/product_uuid").chmod(0o400)
    arguments = ["--root", str(root), "--user", "nobody"]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == UUID
