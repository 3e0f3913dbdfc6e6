"""The agent as one file."""

from __future__ import annotations

import ast
import gc
import hashlib
import io
import json
import os
import shutil
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
from vmprovision.host.cache import CACHE_VARIABLE
from vmprovision.host.data import data_directory
from vmprovision.runtime import archive
from vmprovision.runtime.archive import build_archive
from vmprovision.runtime.condensing import condense, rename
from vmprovision.runtime.store import host_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import RunCli

SIZE_LIMIT = 42 << 10

forget = archive._zip.cache_clear  # noqa: SLF001 -- what this process remembers


def test_same_source_gives_same_bytes(tmp_path: Path) -> None:
    """Processes with other time zones, umasks and hash seeds build the same archive."""
    code = "from vmprovision.runtime.archive import build_archive; print(build_archive().sha256)"
    digests = set()
    for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo")):
        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.umask(0o{seed}7); {code}"],
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "TZ": zone,
                CACHE_VARIABLE: str(tmp_path / seed),  # so that both build it
            },
        )
        digests.add(done.stdout.strip())
    assert digests == {build_archive().sha256}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give an empty cache, and forget the archive in this process."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def read_again() -> bytes:
    """Return the archive as the next process gets it."""
    forget()
    return build_archive().content


def test_the_next_process_takes_the_archive_from_the_cache(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is built once; other sources give another archive."""
    built = build_archive().content
    (kept,) = (own_cache / "agent").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_build_zip", lambda: pytest.fail("it was built again"))
        assert read_again() == built
        patch.setattr(archive, "_sources_digest", lambda: "0" * 64)
        patch.setattr(archive, "_build_zip", lambda: b"another")
        assert read_again().endswith(b"another")


def test_a_cached_archive_that_was_changed_is_built_again(own_cache: Path) -> None:
    """A cached archive with another digest is built again, and a pipe is not even read."""
    built = build_archive().content
    (kept,) = (own_cache / "agent").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert read_again() == built
    kept.unlink()
    os.mkfifo(kept)
    assert read_again() == built
    assert kept.is_file()


def test_a_cache_that_others_can_write_to_is_not_used(own_cache: Path) -> None:
    """A cache that others can write to is ignored, because they could change the digest too."""
    built = build_archive().content
    (kept,) = (own_cache / "agent").iterdir()
    content = b"evil"
    kept.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    assert read_again().endswith(content), "the test's own file is not accepted"
    (own_cache / "agent").chmod(0o770)
    assert read_again() == built


def test_every_source_counts(tmp_path: Path) -> None:
    """Changing any module or template changes the key."""
    package = tmp_path / "vmprovision"
    shutil.copytree(Path(agent.__file__).parents[1], package)
    shutil.copytree(data_directory("templates"), tmp_path / "templates")
    code = "from vmprovision.runtime import archive; print(archive._sources_digest())"

    def digest() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    digests = [digest()]
    for path in (package / "changes/operations.py", tmp_path / "templates/agent/launcher.sh.j2"):
        with path.open("a") as file:
            file.write("\n")
        digests.append(digest())
    assert len({*digests}) == 3


def test_the_archive_is_small_and_holds_source_only() -> None:
    """The archive has at most 42 KB, and contains nothing compiled and nothing of the host."""
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
    """Modules that are rarely needed are loaded only on use, to save memory."""
    with zipfile.ZipFile(io.BytesIO(build_archive().content)) as archive:
        modules = archive.read("guest_agent/modules")
    assert modules.find(f"\n{name} ".encode()) > modules.find(b"\nmain ")


def test_agent_build_writes_a_program(run_cli: RunCli, tmp_path: Path) -> None:
    """`vmprovision agent build` writes a file that can be run directly."""
    target = tmp_path / "guest-agent"
    run_cli("agent", "build", "-o", target)
    assert target.read_bytes() == build_archive().content
    done = subprocess.run(
        [target, "--version"], capture_output=True, check=True, text=True, timeout=60
    )
    assert build_archive().version in done.stdout


def test_agent_build_makes_a_program_that_needs_no_python(run_cli: RunCli, tmp_path: Path) -> None:
    """With --runtime the file runs without a shell and without Python."""
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
    """Return the syntax tree of a source without docstrings and ``pass``."""
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
    """Condensing removes only comments, docstrings and blank lines."""
    source = module.read_text("ascii")
    condensed = condense(source)
    assert structure(condensed) == structure(source)
    assert len(condensed) < len(source)
    assert not [line for line in condensed.splitlines() if line.lstrip().startswith("# ")]


def let_others_run(*_: object) -> None:
    """Return Python code at the end of which CPython may switch threads."""
    time.sleep(0)


def test_condensing_in_several_threads() -> None:
    """Injections in several threads do not affect each other's archive.

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
    """A guest gets at most 42 KB."""
    assert len(build_archive().content) <= 42 * 1024


def test_names_of_our_own_become_short() -> None:
    """Names of a module are renamed at every use, except those that others look up by name."""
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


def test_only_names_of_our_own_are_renamed() -> None:
    """Python's parser finds no changed attribute of others, keyword, string or import."""
    sources = {
        path.stem: condense(path.read_text("ascii"))
        for path in Path(agent.__file__).parent.glob("*.py")
        if path.stem not in {"__main__", "__init__"}
    }
    renamed = rename(sources)
    trees = {name: (ast.parse(sources[name]), ast.parse(renamed[name])) for name in sources}
    defined = {
        name for old, _ in trees.values() for node in old.body for name in names_defined_by(node)
    }
    nodes = [node for old, _ in trees.values() for node in ast.walk(old)]
    foreign = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    changed = set()
    for old, new in trees.values():
        for before, after in zip(ast.walk(old), ast.walk(new), strict=True):
            assert type(before) is type(after)
            if isinstance(before, ast.Attribute) and isinstance(after, ast.Attribute):
                if before.attr != after.attr:
                    owner = before.value.id if isinstance(before.value, ast.Name) else None
                    is_private = before.attr.startswith("_") and owner not in foreign
                    assert owner in sources or is_private, before.attr
                    changed.add(before.attr)
            elif isinstance(before, ast.Name) and isinstance(after, ast.Name):
                assert before.id == after.id or before.id in defined, before.id
            elif isinstance(before, ast.keyword) and isinstance(after, ast.keyword):
                assert before.arg == after.arg
            elif isinstance(before, ast.Constant) and isinstance(after, ast.Constant):
                assert before.value == after.value
            elif isinstance(before, ast.Import) and isinstance(after, ast.Import):
                assert ast.dump(before) == ast.dump(after)
    assert len(changed) > 50


def names_defined_by(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    inner = [name for part in targets for name in ast.walk(part) if isinstance(name, ast.Name)]
    return [name.id for name in inner]
