"""The agent as one file."""

from __future__ import annotations

import ast
import gc
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.agent.interpreters import MICROPYTHON, get_interpreter
from vmprovision import agent
from vmprovision.runtime.archive import build_archive
from vmprovision.runtime.condensing import condense, rename
from vmprovision.runtime.store import host_architecture

if TYPE_CHECKING:
    from tests.conftest import RunCli

SIZE_LIMIT = 42 << 10


def test_same_source_gives_same_bytes() -> None:
    """Another process with another time zone, umask and hash seed builds the same archive."""
    code = "from vmprovision.runtime.archive import build_archive; print(build_archive().sha256)"
    digests = set()
    for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo")):
        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.umask(0o{seed}7); {code}"],
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone},
        )
        digests.add(done.stdout.strip())
    assert digests == {build_archive().sha256}


def test_the_archive_is_small_and_holds_source_only() -> None:
    """At most 42 KB; nothing compiled, nothing of the host."""
    content = build_archive().content
    assert len(content) <= SIZE_LIMIT
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
        bundles = archive.read("guest_agent/modules")
    assert "__main__.py" in names
    bundled = {"guest_agent/modules"}
    assert all(name.endswith(".py") for name in names - bundled)
    modules = {path.stem for path in Path(agent.__file__).parent.glob("*.py")} - {"__main__"}
    packed = {name[12:-3] for name in names if name.endswith(".py")} - {"__main__"}
    while bundles:
        head, _, rest = bundles.partition(b"\n")
        name, size = head.decode().split()
        ast.parse(rest[: int(size)])
        bundles = rest[int(size) :]
        packed.add(name)
    assert packed - {""} == modules


@pytest.mark.parametrize("name", ["configure", "check", "install", "services"])
def test_what_is_rarely_needed_stays_apart(name: str) -> None:
    """A small heap holds no module before it is asked for."""
    with zipfile.ZipFile(io.BytesIO(build_archive().content)) as archive:
        modules = archive.read("guest_agent/modules")
    assert modules.find(f"\n{name} ".encode()) > modules.find(b"\nmain ")


def test_agent_build_writes_a_program(run_cli: RunCli, tmp_path: Path) -> None:
    """`vmprovision agent build` gives a file that runs by itself."""
    target = tmp_path / "guest-agent"
    run_cli("agent", "build", "-o", target)
    assert target.read_bytes() == build_archive().content
    done = subprocess.run(
        [target, "--version"], capture_output=True, check=True, text=True, timeout=60
    )
    assert build_archive().version in done.stdout


def test_agent_build_makes_a_program_that_needs_no_python(run_cli: RunCli, tmp_path: Path) -> None:
    """With --runtime the file runs where there is nothing else, not even a shell."""
    runtime = get_interpreter(MICROPYTHON).argv[0]
    target = tmp_path / "guest-agent"
    done = run_cli("agent", "build", "--runtime", host_architecture(), "-o", target, "--json")
    assert json.loads(done.stdout)["size"] == target.stat().st_size <= 480 << 10
    assert target.read_bytes().startswith(Path(runtime).read_bytes())
    run = subprocess.run(
        [target, "--version"], capture_output=True, check=True, text=True, timeout=60, env={}
    )
    assert run.stdout == f"guest-agent {build_archive().version} (MicroPython 1.25.0)\n"


def structure(source: str) -> str:
    """What Python understands of a source, apart from docstrings and ``pass``."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                del node.body[0]
            node.body = [part for part in node.body if not isinstance(part, ast.Pass)]
    return ast.dump(tree)


@pytest.mark.parametrize(
    "module", sorted(Path(agent.__file__).parent.glob("*.py")), ids=lambda module: module.stem
)
def test_condensed_source_means_the_same(module: Path) -> None:
    """Nothing but comments, docstrings and blank lines is left out of the archive."""
    source = module.read_text("ascii")
    condensed = condense(source)
    assert structure(condensed) == structure(source)
    assert len(condensed) < len(source)
    assert not [line for line in condensed.splitlines() if line.lstrip().startswith("# ")]


def let_others_run(*_: object) -> None:
    """Python code, at whose end CPython may change threads."""
    time.sleep(0)


def test_condensing_in_several_threads() -> None:
    """Injections in threads do not disturb each other's agent.

    Threads are changed wherever CPython can: at the end of every collection of garbage.
    """
    sources = [path.read_text("ascii") for path in Path(agent.__file__).parent.glob("*.py")]
    alone = [condense(source) for source in sources]
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    gc.callbacks.append(let_others_run)
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(condense, sources))
    finally:
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
        gc.callbacks.pop()
    assert together == alone


def test_the_archive_stays_small() -> None:
    """A guest gets 42 KB at most."""
    assert len(build_archive().content) <= 42 * 1024


def test_names_of_our_own_become_short() -> None:
    """What a module defines is renamed wherever it is used, but not what others know by name."""
    one = "import os\n{LIMIT}=1\ndef {describe}(settings):\n return os.getenv('describe')+{LIMIT}\n"
    one += "def getenv(_name):\n return open\ndef loaded():\n pass\n"
    one += "def to_bytes(text):\n return (1).to_bytes(2)\ndef stdin():\n call(stdin=1)\n"
    two = "from.import one\nclass {Thing}(object):\n def __init__(self):\n"
    two += "  self.{_kept}=one.{describe}(1)\n  self.{_kept}+=one.{LIMIT}\n"
    two += "def main():\n getattr(one,'loaded')()\n os._exit({Thing}('LIMIT is \\'here'))\n"
    names = {"LIMIT": "A", "Thing": "B", "_kept": "C", "describe": "describe"}
    whole = {name: name for name in names}
    assert rename({"one": one.format(**whole), "two": two.format(**whole)}) == {
        "one": one.format(**names),
        "two": two.format(**names),
    }
