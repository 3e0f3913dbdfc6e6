"""What no kernel writes, in every file of /proc that is measured: seeded, on each interpreter."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from vmprovision.agent import (
    addresses,
    exposition,
    jsonio,
    metrics,
)

from .agents import parse_response, running_agent

if TYPE_CHECKING:
    from .agents import Agent
    from .interpreters import Interpreter

HERE = Path(__file__).parent
SEED = 11
WORDS = (
    *(b"nan", b"inf", b"-1", b"1e999", b"0x1F", b"1_0", b"", b"\xff\xfe", b"\0", b"9" * 400),
    *(b"18446744073709551616", b"-9223372036854775809", b"zz", b"G0000000", b"00FFFFFF00", b"|--"),
    *(
        "\u0663".encode(),
        b"\\777",
        b"\\0",
        b"a=b",
        b"=",
        b":",
        b"-",
        b"+5",
        b"FFFFFFFF",
        b"x" * 3000,
    ),
)
NETWORK = {
    "net/route": b"Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    b"eth0 00000000 010200C0 0003 0 0 100 00000000 0 0 0\n"
    b"eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n",
    "net/ipv6_route": b"%(0)s 00 %(0)s 00 fd00%(1)s 00000400 00000002 00000000 00000003 eth0\n"
    % {b"0": b"0" * 32, b"1": b"0" * 28},
    "net/fib_trie": b"Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 192.0.2.2\n        /32 host LOCAL\n",
    "net/if_inet6": b"fd000000000000000000000000000002 04 40 00 82     eth0\n",
}
SAMPLE = re.compile(r'[a-zA-Z_:][\w:]*(?:\{(?:\w+="(?:[^"\\\n]|\\.)*",?)*\})? (\S+)')


def lay_out(folder: Path) -> Path:
    """Return a copy of a modern kernel's files, with network tables."""
    proc = folder / "proc"
    shutil.copytree(HERE / "proc-6.1", proc)
    for name, content in NETWORK.items():
        (proc / name).write_bytes(content)
    return proc


def spoil(rng: random.Random, content: bytes) -> bytes:
    """Return the content with some invalid words, lines or bytes."""
    for _ in range(rng.randint(1, 6)):
        words = re.split(rb"([ \t\n]+)", content)
        at = rng.randrange(len(words))
        kind = rng.randrange(5)
        if kind < 3:
            words[at] = rng.choice(WORDS)
        elif kind == 3:
            del words[at : at + rng.randint(1, 9)]
        else:
            words[at:at] = words[at : at + rng.randint(1, 30)] * rng.randint(1, 5)
        content = b"".join(words) or b"\n"
    return content[: rng.choice((len(content), rng.randrange(len(content))))] or b"\n"


def refuse(name: str) -> NoReturn:
    """Fail for a number that JSON does not have."""
    pytest.fail(f"{name} is not JSON")


def check_exposition(text: str) -> None:
    """Fail if a line is not a sample of finite value in Prometheus' format."""
    for line in text.splitlines():
        if not line.startswith("#"):
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert math.isfinite(float(sample[1])), line


@pytest.mark.parametrize("seed", range(SEED, SEED + 150))
def test_odd_files_spoil_nothing(tmp_path: Path, seed: int) -> None:
    """With any content, nothing is raised, and each number is valid JSON."""
    rng = random.Random(seed)
    proc = lay_out(tmp_path)
    for path in sorted(path for path in proc.rglob("*") if path.is_file()):
        path.write_bytes(spoil(rng, path.read_bytes()))
    measured = metrics.Metrics(str(proc), "/nowhere", lambda: 0.0)
    measured.tick(0.0)
    json.loads(jsonio.dumps(measured.read()), parse_constant=refuse)
    check_exposition(b"".join(exposition.render(str(proc), "/nowhere", None)).decode())
    addresses.choose(
        addresses.read_kernel_tables(str(proc)), addresses.default_interfaces(str(proc))
    )


def test_an_agent_stays_on_its_feet(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Forty odd states of /proc are answered with 200 in both forms on every interpreter."""
    rng = random.Random(SEED)
    proc = lay_out(tmp_path)
    files = {path: path.read_bytes() for path in sorted(proc.rglob("*")) if path.is_file()}
    arguments = ["--proc", str(proc), "--root", "/nowhere"]
    with running_agent(interpreter, program, tmp_path, arguments=arguments) as agent:
        for _ in range(40):
            for path, content in files.items():
                path.write_bytes(spoil(rng, content))
            json.loads(ask(agent, "application/json"), parse_constant=refuse)
            check_exposition(ask(agent, "text/plain").decode())
        assert not re.search(r"Traceback|Error\b", agent.log_text())


def ask(agent: Agent, accept: str) -> bytes:
    """Return the body of /metrics in a form."""
    lines = ("GET /metrics HTTP/1.1", "Host: guest", "Connection: close", f"Accept: {accept}")
    answer = parse_response(agent.exchange("\r\n".join([*lines, "", ""]).encode()))
    assert answer.status == 200, answer.body
    return answer.body
