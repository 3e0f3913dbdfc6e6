"""RUNTIMES.json and the runtimes that it lists are checked before they are injected."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmprovision.changes.conditions import digest
from vmprovision.errors import BundledRuntimeError
from vmprovision.runtime import store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli


@pytest.fixture
def cache(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the runtimes' folder of a private cache, with this host's runtime in it."""
    built = runtime.parent
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path))
    shutil.copytree(built, store.cached_folder())
    return store.cached_folder()


def test_the_list_says_what_there_is(cache: Path) -> None:
    """The list has the correct digest, size, architecture, version and compiler."""
    document = json.loads((cache / "RUNTIMES.json").read_bytes())
    facts = document["runtimes"][store.host_architecture()]
    content = (cache / f"python-{store.host_architecture()}").read_bytes()
    assert facts["architecture"] == store.host_architecture()
    assert facts["sha256"] == digest(content)
    assert facts["size"] == len(content) <= 480 << 10
    assert facts["micropython"] == "1.25.0"
    assert facts["compiler"]


def test_licences_stand_beside(cache: Path) -> None:
    """The licences of all linked code are beside the runtimes."""
    text = (cache / "LICENCES").read_text()
    for owner in ("Damien P. George", "Joergen Ibsen", "Rich Felker"):
        assert owner in text


def test_one_bit_is_noticed(cache: Path, run_cli: RunCli) -> None:
    """A runtime with another digest is refused, and building replaces it."""
    path = cache / f"python-{store.host_architecture()}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        BundledRuntimeError, match=r"not have the SHA-256 that RUNTIMES\.json lists"
    ):
        store.load(store.find_runtime(store.host_architecture()))
    done = run_cli("runtime", "verify", "--json", check=False)
    assert done.returncode == 81
    assert json.loads(done.stdout)["error"]["kind"] == "BundledRuntimeError"
    assert "--refresh" in done.stderr
    findings = json.loads(run_cli("doctor", "--json", check=False).stdout)["findings"]
    (finding,) = [each for each in findings if each["subject"] == "runtime"]
    assert (finding["ok"], finding["needed"]) == (False, False)


def test_a_missing_runtime_is_noticed(cache: Path) -> None:
    """A list whose files are missing gives a clear error."""
    (cache / f"python-{store.host_architecture()}").unlink()
    with pytest.raises(BundledRuntimeError, match="No such file"):
        store.load(store.find_runtime(store.host_architecture()))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"runtimes": {"x86_64": {"sha256": 1}}}'])
def test_a_damaged_list_is_an_error(text: str, cache: Path, run_cli: RunCli) -> None:
    """A damaged list gives one clear error."""
    (cache / "RUNTIMES.json").write_text(text)
    done = run_cli("runtime", "list", check=False)
    assert done.returncode == 81
    assert "is damaged" in done.stderr


def test_nothing_built_is_no_error(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without runtimes, the list is empty and names the command that builds one."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path))
    assert "vmprovision runtime build" in run_cli("runtime", "list").stdout
    assert json.loads(run_cli("runtime", "list", "--json").stdout) == {"runtimes": []}


def test_a_runtime_runs_alone(runtime: Path) -> None:
    """A runtime for another architecture or cut in half is refused."""
    content = runtime.read_bytes()
    store.check_program(content, store.host_architecture(), "it")
    with pytest.raises(BundledRuntimeError, match="not a program for mips: it is for"):
        store.check_program(content, "mips", "it")
    with pytest.raises(BundledRuntimeError, match="not an ELF file"):
        store.check_program(b"#!/bin/sh\n" * 20, store.host_architecture(), "it")
    with pytest.raises(BundledRuntimeError, match="damaged or needs libraries"):
        store.check_program(content[:80], store.host_architecture(), "it")


def test_a_program_with_a_loader_is_refused(tmp_path: Path) -> None:
    """A dynamically linked program is refused: the guest may lack its libraries."""
    (tmp_path / "a.c").write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-o", tmp_path / "a", tmp_path / "a.c"], check=True)
    with pytest.raises(BundledRuntimeError, match="needs libraries"):
        store.check_program((tmp_path / "a").read_bytes(), store.host_architecture(), "it")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("x86_64", "x86_64"), ("arm64", "aarch64"), ("armv7", "armv7l"), ("i686", "i386")],
)
def test_architectures_have_several_names(name: str, architecture: str) -> None:
    """Architectures are found by the names that distributions and compilers use."""
    assert store.architecture_named(name) == architecture


def test_other_architectures_are_refused_by_name(run_cli: RunCli) -> None:
    """The error for an unknown architecture lists the known ones."""
    done = run_cli("runtime", "build", "vax", check=False)
    assert done.returncode == 81
    assert "there is no runtime for vax" in done.stderr
    assert "s390x" in done.stderr


def test_another_source_is_refused(run_cli: RunCli, tmp_path: Path) -> None:
    """Only the pinned source is compiled, even if the caller supplies it."""
    tarball = tmp_path / "micropython.tar.xz"
    tarball.write_bytes(b"not it")
    environment = {"VMPROVISION_CACHE": str(tmp_path / "cache")}
    done = run_cli("runtime", "build", "--source", tarball, check=False, env=environment)
    assert done.returncode == 81
    assert "its SHA-256 is" in done.stderr
    assert not list((tmp_path / "cache").glob("runtimes/*/*"))
