"""One reading of the configuration: by the agent, through systemd's own parser, and by the host."""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import require
from vmprovision.agent import config
from vmprovision.guest.configuration import parse_configuration, update_configuration

from .agents import running_agent
from .interpreters import Interpreter
from .test_process import ONE_OF_EACH, run_to_end
from .test_pure import Collect

if TYPE_CHECKING:
    from collections.abc import Callable

SYSTEMD = sorted(Path("/usr/lib").glob("**/libsystemd-shared-*.so"))
# What the parsers of env files differ in, and some of what they agree on.
WORDS = st.sampled_from(
    [
        *(b"VM_ID", b"TOKEN", b"=", b" ", b"\t", b"#", b"'", b'"', b"\\", b"\r", b"\n", b"export"),
        *(b"x", b"1", b"$x", b"`", b"%41", b";", b"\x0b", b"\xc3\xa9", b"\xff", b"\0", b"\xc2\xa0"),
        *(b"\xef\xbb\xbf", b"VM_ID=web-1 # named by hand\n", b"PORT='18121' # the other address\n"),
    ]
)
CONFIGURATIONS = st.one_of(st.lists(WORDS, max_size=20).map(b"".join), st.binary(max_size=200))


@pytest.fixture(scope="module")
def load_env_file() -> Callable[[Path], dict[bytes, bytes]]:
    """Return systemd's function that reads an EnvironmentFile=, from its library."""
    require(SYSTEMD, "systemd's libsystemd-shared is not installed")
    library = ctypes.CDLL(str(SYSTEMD[-1]))

    def load(path: Path) -> dict[bytes, bytes]:
        found = ctypes.POINTER(ctypes.c_char_p)()
        assert library.load_env_file(None, os.fsencode(path), ctypes.byref(found)) == 0
        variables: dict[bytes, bytes] = {}
        at = 0
        while found and (variable := found[at]):
            name, _, variables[name] = variable.partition(b"=")
            at += 1
        return variables

    return load


def pairs(content: bytes) -> list[tuple[str, str]]:
    """Return what the agent reads."""
    return list(config.parse_pairs(content, Collect()))


def test_systemds_parser_reads_other_values(
    load_env_file: Callable[[Path], dict[bytes, bytes]], tmp_path: Path
) -> None:
    """Why the settings go through it as one opaque text: comments, quotes and backslashes."""
    path = tmp_path / "conf"
    path.write_bytes(b"A=web-1 # by hand\nB='a' # b\nC=a\\b\n")
    assert load_env_file(path) == {b"A": b"web-1 # by hand", b"B": b"a# b", b"C": b"ab"}
    assert pairs(path.read_bytes()) == [("A", "web-1"), ("B", "a"), ("C", "a\\b")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=CONFIGURATIONS)
def test_systemd_hands_over_what_the_file_says(
    load_env_file: Callable[[Path], dict[bytes, bytes]], tmp_path: Path, content: bytes
) -> None:
    """The parser of systemd passes on the exact bytes of any file."""
    (tmp_path / "conf").write_bytes(content)
    (tmp_path / "handed").write_text("".join(config.hand_over(str(tmp_path / "conf"))), "ascii")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in load_env_file(tmp_path / "handed").items():
            patch.setenv(name.decode(), value.decode())
        assert config.take_over() == content


@settings(deadline=None)
@given(content=CONFIGURATIONS)
def test_the_host_reads_what_the_agent_reads(content: bytes) -> None:
    """Keys and values are the same on both sides, and a change on the host is read by the agent."""
    known = {key: value for key, value in pairs(content) if re.fullmatch(r"[A-Z_][A-Z_0-9]*", key)}
    read = parse_configuration(content)
    assert {key: value for key, value in read.items() if key in known}.keys() == known.keys()
    for key, value in known.items():
        if "?" not in value:  # which stands for each byte that is not UTF-8
            assert read[key] == value
    changed = update_configuration(content, {"VM_ID": "web-2", "PORT": "81"})
    assert dict(pairs(changed))["VM_ID"] == "web-2"
    assert dict(pairs(changed))["PORT"] == "81"


def test_large_files_pass_systemd(
    load_env_file: Callable[[Path], dict[bytes, bytes]], tmp_path: Path
) -> None:
    """A file of 64 KiB of the worst bytes fits: no variable is longer than execve(2) takes."""
    (tmp_path / "conf").write_bytes(b"\xff" * 65536)
    (tmp_path / "handed").write_text("".join(config.hand_over(str(tmp_path / "conf"))), "ascii")
    found = load_env_file(tmp_path / "handed")
    assert max(len(name) + len(value) for name, value in found.items()) < 128 * 1024 - 2
    assert sum(map(len, found.values())) == 3 * 65536


SETTINGS = 'VM_ID=web-1 # named by hand\nPORT="18121" # the other address\nTOKEN=a\\b#c\n'


def test_an_agent_that_may_not_read_has_the_same_settings(
    load_env_file: Callable[[Path], dict[bytes, bytes]],
    interpreter: Interpreter,
    program: Path,
    tmp_path: Path,
) -> None:
    """The settings that `identify` hands over through systemd equal those in the file."""
    secret = tmp_path / "secret.conf"
    secret.write_text(SETTINGS)
    secret.chmod(0o600)
    handed = tmp_path / "run" / "guest-agent.identity"
    handed.parent.mkdir()
    handed.touch(0o644)  # another version's
    run = run_to_end(
        interpreter, program, "identify", "--root", str(tmp_path), "--config", str(secret)
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert handed.stat().st_mode & 0o777 == 0o600
    secret.chmod(0)
    environment = {name.decode(): value.decode() for name, value in load_env_file(handed).items()}
    with running_agent(
        *(unable_to_read(interpreter), program, tmp_path),
        arguments=["--config", str(secret)],
        environment=environment,
    ) as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "web-1"
        assert "may not be read: using the environment" in agent.log_text()
        assert "ignored" not in agent.log_text()


def unable_to_read(interpreter: Interpreter) -> Interpreter:
    """Return the interpreter, run without root's right to read files of other users."""
    if os.geteuid() != 0:
        return interpreter
    dropped = "-dac_override,-dac_read_search"
    argv = ("setpriv", "--bounding-set", dropped, "--inh-caps", dropped, *interpreter.argv)
    return Interpreter(name=interpreter.name, argv=argv)


@ONE_OF_EACH
def test_variables_are_read_as_lines_are(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A value from another service manager's parser is read like a line of the file."""
    secret = tmp_path / "secret.conf"
    secret.touch()
    secret.chmod(0)
    with running_agent(
        *(unable_to_read(interpreter), program, tmp_path),
        arguments=["--config", str(secret)],
        environment={"VM_ID": "'web-1' # named by hand", "INTERFACE": "eth7 # the other one"},
    ) as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "web-1"
        agent.await_log("addresses on eth7: none")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("export\tVM_ID=a", "a"),
        ("export VM_ID = a", "a"),
        ("VM_ID=a\t# b", "a"),
        ("VM_ID=a#b", "a#b"),
        ("VM_ID='a # b' c", "a # b"),
        ('VM_ID="', '"'),
        ("VM_ID=\u00a0a\u00a0", "\u00a0a\u00a0"),
        ("VM_ID=" + "\u00fc" * 128, "\u00fc" * 128),
        ("VM_ID=" + "\u20ac" * 129, None),
        ("VM_ID=" + "x" * 129, None),
    ],
    ids=range(10),
)
def test_lines_of_every_kind(
    interpreter: Interpreter, program: Path, tmp_path: Path, line: str, value: str | None
) -> None:
    """Every interpreter reads a line alike, and counts characters rather than bytes."""
    with running_agent(interpreter, program, tmp_path, config=line + "\n") as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == value


@pytest.mark.parametrize(
    "content",
    [
        "K=1\n" * 15000,
        "".join(f"K{number}=1\n" for number in range(7000)),
        "nonsense\n" * 7000,
        "# a comment\n" * 5400,
        "ALLOW=" + ",".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(4300)) + "\n",
        "UNKNOWN=" + "x" * 65000 + "\n",
    ],
    ids=["same-key", "keys", "nonsense", "comments", "networks", "one-line"],
)
@ONE_OF_EACH
def test_large_configurations_are_read(
    interpreter: Interpreter, program: Path, tmp_path: Path, content: str
) -> None:
    """64 KiB of settings leave a small heap its room, and the last line counts."""
    with running_agent(interpreter, program, tmp_path, config=content + "VM_ID=last\n") as agent:
        assert json.loads(agent.get("/info").body)["vm_id"] == "last"
        assert agent.log_text().count("\n") < 50
        assert "Traceback" not in agent.log_text()
