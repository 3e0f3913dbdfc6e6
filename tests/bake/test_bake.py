"""Whole bakes of real images: what is written, the cache, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import resource
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from tests.image.tiny import tiny_disk
from tests.image.trees import Mount, Sight, differences, look_into
from vmprovision.bake.schema import RESERVED
from vmprovision.host.cache import cache_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import RunCli

CACHED_SECONDS = 5.0
STATUS = """\
Package: base-files
Status: install ok installed
Architecture: amd64
Version: 12.4

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
BAKE_FILE = """\
[source]
image = "guest.raw"
sha256 = "{sha256}"

[agent]
manager_url = "http://192.0.2.1:3000"
token_file = "token"

[[output]]
format = "qcow2"
compress = true

[[output]]
format = "raw"
name = "plain.img"

[[output]]
format = "oci"
"""


@dataclass(frozen=True)
class Golden:
    """A folder with a bake file and its source, baked once."""

    file: Path
    report: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.file.with_suffix("")

    @property
    def entry(self) -> Path:
        """The folder in the cache."""
        return cache_directory() / "bake" / str(self.report["key"])


def processor_seconds() -> float:
    """Return the processor time of finished child processes, which load does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_source(folder: Path) -> Path:
    """Write a bake file whose source nobody has baked before."""
    folder.mkdir(exist_ok=True)
    image = tiny_disk(
        folder / "guest.raw",
        {"/var/lib/dpkg/status": STATUS, "/etc/chance": secrets.token_hex()},
    )
    (folder / "token").write_text("se.cret\n")
    file = folder / "golden.toml"
    file.write_text(BAKE_FILE.format(sha256=hashlib.sha256(image.read_bytes()).hexdigest()))
    return file


def bake(run_cli: RunCli, file: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """The report of one bake."""
    done = run_cli("bake", file, *options, "--json", check=False)
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == code, done.stderr
    (result,) = document["results"]
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def golden(run_cli: RunCli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    """A bake that is done; its entry in the cache is removed at the end."""
    file = make_source(tmp_path_factory.mktemp("golden"))
    made = Golden(file, bake(run_cli, file))
    assert made.report["outcome"] == "baked"
    yield made
    shutil.rmtree(made.entry, ignore_errors=True)
    made.entry.with_name(made.entry.name + ".lock").unlink(missing_ok=True)


@pytest.mark.appliance
def test_all_outputs_are_beside_each_other(golden: Golden) -> None:
    """Exactly the documented files; sha256sum itself agrees with their sums."""
    names = {path.name for path in golden.folder.iterdir()}
    assert names == {"golden.qcow2", "plain.img", "golden.oci", *RESERVED}
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=golden.folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    # it holds a token
    assert (golden.folder / "golden.qcow2").stat().st_mode & 0o777 == 0o600
    assert (golden.folder / "bake.json").stat().st_mode & 0o777 == 0o644
    assert {path.name for path in golden.file.parent.iterdir()} == {
        "golden",
        "golden.toml",
        "guest.raw",
        "token",
    }
    assert list(golden.report["steps"]) == [
        *("fetch", "check", "inject", "verify", "convert", "describe")
    ]


@pytest.mark.appliance
def test_bake_json_says_how_the_image_came_to_be(golden: Golden) -> None:
    """Plan, receipt, versions and hashes are those of this image; no secret is in any file."""
    document = json.loads((golden.folder / "bake.json").read_text())
    assert document["key"] == golden.report["key"]
    assert document["guest"]["distro"] == "debian"
    planned = [operation["path"] for operation in document["plan"]]
    received = [entry["path"] for entry in document["receipt"]["entries"]]
    assert "/usr/local/bin/guest-agent" in planned
    assert set(received) <= set(planned)
    assert document["verified"] == len(received)
    assert document["proof"] is None
    image = golden.folder / "golden.qcow2"
    assert document["images"]["golden.qcow2"] == hashlib.sha256(image.read_bytes()).hexdigest()
    for name in RESERVED:
        assert b"se.cret" not in (golden.folder / name).read_bytes()
        assert str(golden.file.parent).encode() not in (golden.folder / name).read_bytes()


@pytest.mark.appliance
def test_the_sbom_is_valid_and_complete(golden: Golden) -> None:
    """CycloneDX's own schema accepts it; it has the packages, and the agent with its files."""
    from cyclonedx.schema import SchemaVersion  # noqa: PLC0415 -- takes seconds, in every worker
    from cyclonedx.validation.json import JsonStrictValidator  # noqa: PLC0415 -- likewise

    text = (golden.folder / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    agent, package = document["components"]
    assert package["purl"] == "pkg:deb/debian/base-files@12.4?arch=amd64&distro=debian-12"
    receipt = json.loads((golden.folder / "bake.json").read_text())["receipt"]
    hashes = {e["path"]: e["sha256"] for e in receipt["entries"] if e["kind"] == "file"}
    assert agent["hashes"][0]["content"] == hashes.pop("/usr/local/bin/guest-agent")
    files = {each["name"]: each["hashes"][0]["content"] for each in agent["components"]}
    assert files == hashes
    assert document["metadata"]["component"]["name"] == "debian"
    assert document["metadata"]["properties"] == [
        {"name": "vmprovision:package-database", "value": "/var/lib/dpkg/status"}
    ]


@pytest.mark.appliance
def test_the_statement_names_images_and_materials(golden: Golden) -> None:
    """Its subjects have the hashes of the images, its materials those of the sources."""
    statement = json.loads((golden.folder / "provenance.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    assert set(subjects) == {"golden.qcow2", "plain.img", "golden.oci/index.json"}
    for name, digest in subjects.items():
        assert hashlib.sha256((golden.folder / name).read_bytes()).hexdigest() == digest
    definition = statement["predicate"]["buildDefinition"]
    materials = {
        each["uri"]: each["digest"]["sha256"] for each in definition["resolvedDependencies"]
    }
    source = golden.file.with_name("guest.raw")
    assert materials["file:guest.raw"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert materials["file:golden.toml"] == hashlib.sha256(golden.file.read_bytes()).hexdigest()
    suite = ET.parse(golden.folder / "junit.xml").getroot()  # noqa: S314 -- ours
    assert (suite.get("failures"), suite.get("tests")) == ("0", "5")


@pytest.mark.appliance
def test_the_second_run_verifies_and_makes_nothing(golden: Golden, run_cli: RunCli) -> None:
    """It takes less than 5 s; --check agrees; the cache serves where the output is gone."""
    before = {path: path.stat().st_mtime_ns for path in golden.folder.rglob("*")}
    began = processor_seconds()
    assert bake(run_cli, golden.file)["outcome"] == "current"
    assert processor_seconds() - began < CACHED_SECONDS
    assert bake(run_cli, golden.file, "--check")["outcome"] == "current"
    assert {path: path.stat().st_mtime_ns for path in golden.folder.rglob("*")} == before
    shutil.rmtree(golden.folder)
    assert bake(run_cli, golden.file, "--check", code=4)["outcome"] == "outdated"
    assert not golden.folder.exists()
    began = processor_seconds()
    assert bake(run_cli, golden.file)["outcome"] == "cached"
    assert processor_seconds() - began < CACHED_SECONDS
    assert bake(run_cli, golden.file, "--check")["outcome"] == "current"


@pytest.mark.appliance
def test_what_was_changed_is_not_believed(golden: Golden, run_cli: RunCli) -> None:
    """A changed output is replaced from the cache, a changed cache is not used."""
    image = golden.folder / "golden.qcow2"
    good = image.read_bytes()
    image.write_bytes(good[:-1] + b"!")
    assert bake(run_cli, golden.file, "--check", code=4)["outcome"] == "outdated"
    assert bake(run_cli, golden.file)["outcome"] == "cached"
    assert image.read_bytes() == good
    (golden.folder / "more").touch()
    assert bake(run_cli, golden.file)["outcome"] == "cached"
    assert not (golden.folder / "more").exists()
    (golden.entry / "plain.img").write_bytes(b"")
    image.unlink()
    assert bake(run_cli, golden.file)["outcome"] == "baked"
    assert bake(run_cli, golden.file)["outcome"] == "current"


@pytest.mark.appliance
def test_baking_twice_gives_the_same_tree(golden: Golden, run_cli: RunCli, tmp_path: Path) -> None:
    """The same inputs, without the cache: every guest file is the same, with mode and owner."""
    result = bake(run_cli, golden.file, "--refresh", "--output", str(tmp_path / "again"))
    assert (result["outcome"], result["key"]) == ("baked", golden.report["key"])
    first, second = golden.folder / "golden.qcow2", tmp_path / "again/golden/golden.qcow2"
    assert first != second
    before, one, other = (
        look_into(Sight(path=path, format=kind, mounts=[Mount(device="")]), tmp_path)
        for path, kind in (
            (golden.file.with_name("guest.raw"), "raw"),
            (first, "qcow2"),
            (second, "qcow2"),
        )
    )
    assert differences(one, other) == {}
    assert len(differences(before, one)) > 5


def test_a_wrong_checksum_leaves_no_output(run_cli: RunCli, tmp_path: Path) -> None:
    """The error is an annotation at the line of the checksum; nothing has opened the file."""
    file = make_source(tmp_path)
    (tmp_path / "guest.raw").write_bytes(b"another image")
    summary = tmp_path / "summary.md"
    done = run_cli(
        "bake",
        file,
        check=False,
        env={
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(tmp_path),
            "GITHUB_STEP_SUMMARY": str(summary),
        },
    )
    assert done.returncode == 83
    found = hashlib.sha256(b"another image").hexdigest()
    (command,) = [line for line in done.stderr.splitlines() if line.startswith("::error")]
    assert command.startswith("::error file=golden.toml,line=3,title=")
    assert found in command
    assert found in summary.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "golden.toml",
        "guest.raw",
        "summary.md",
        "token",
    }


def test_a_misspelt_key_leaves_no_output(run_cli: RunCli, tmp_path: Path) -> None:
    """The error is an annotation at its line; the JUnit report of the run has it too."""
    file = make_source(tmp_path)
    file.write_text(file.read_text().replace("compress", "compres"))
    report = tmp_path / "junit.xml"
    done = run_cli(
        *("bake", file, "--report-junit", report), check=False, env={"GITHUB_ACTIONS": "true"}
    )
    assert done.returncode == 82
    assert (
        f"{file}:11: unknown key 'compres' in [[output]]: did you mean 'compress'?" in done.stderr
    )
    assert f"::error file={file},line=11," in done.stderr
    assert not (tmp_path / "golden").exists()
    suite = ET.parse(report).getroot()  # noqa: S314 -- ours
    assert suite.get("failures") == "1"


@pytest.mark.appliance
def test_a_failure_keeps_the_earlier_output(
    golden: Golden, run_cli: RunCli, tmp_path: Path
) -> None:
    """A bake that fails after its injection leaves the folder of the bake before as it was."""
    folder = tmp_path / "golden"
    shutil.copytree(golden.folder, folder)
    for name in ("guest.raw", "token"):
        shutil.copy(golden.file.with_name(name), tmp_path)
    file = tmp_path / "golden.toml"
    text = golden.file.read_text()
    file.write_text(text + "\n[prove]\ntimeout = 60\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = bake(run_cli, file, code=70)
    assert (result["outcome"], result["line"]) == ("failed", 20)
    assert list(result["steps"]) == ["fetch", "check", "inject", "verify"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {
        *("golden", "golden.toml", "guest.raw", "token")
    }


def test_a_folder_of_somebody_else_is_not_replaced(run_cli: RunCli, tmp_path: Path) -> None:
    """An output folder that no bake has made stays."""
    file = make_source(tmp_path)
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "photos").touch()
    result = bake(run_cli, file, code=10)
    assert "was not made by a bake" in result["error"]["message"]
    assert (tmp_path / "golden" / "photos").exists()


@pytest.mark.appliance
def test_several_files_bake_side_by_side(golden: Golden, run_cli: RunCli, tmp_path: Path) -> None:
    """A directory of them: one that is faulty stops no other, and each has its result."""
    folder = tmp_path / "images"
    shutil.copytree(golden.file.parent, folder)
    (folder / "broken.toml").write_text("[source]\n")
    done = run_cli(
        "bake", folder, "--jobs", "2", "--output", tmp_path / "out", "--json", check=False
    )
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == 3
    results = {Path(r["file"]).name: (r["outcome"], r["exit_code"]) for r in document["results"]}
    assert results == {"broken.toml": ("failed", 82), "golden.toml": ("cached", 0)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"golden"}


def test_files_with_one_output_folder_are_refused(run_cli: RunCli, tmp_path: Path) -> None:
    """Two bake files of one name would write one folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.toml").touch()
    done = run_cli("bake", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", check=False)
    assert done.returncode == 40
    assert "have the same output folder" in done.stderr
