"""``vmprovision inject`` of several images: one line, one JSON result, one test case for each."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from tests.trees import SYSTEMD_TREE, make_tree
from vmprovision.cli.progress_bars import BatchBars
from vmprovision.errors import ImageError, VmprovisionError
from vmprovision.junit import junit_xml
from vmprovision.progress import Progress
from vmprovision.reports import BatchReport, JobResult

if TYPE_CHECKING:
    from tests.conftest import RunCli


@pytest.fixture
def trees(tmp_path: Path) -> list[Path]:
    """Two guests."""
    return [make_tree(tmp_path / name, SYSTEMD_TREE) for name in ("web.1", "web.2")]


def test_several_images(run_cli: RunCli, trees: list[Path], tmp_path: Path) -> None:
    """Results go to standard output in the order given, the rest goes to standard error."""
    none = tmp_path / "none.qcow2"
    done = run_cli("inject", trees[1], none, trees[0], "--vm-id", "{name}-x", check=False)
    assert done.returncode == 3
    assert [line.partition(": ")[::2] for line in done.stdout.splitlines()] == [
        (str(trees[1]), "agent 0.1.0 injected: 9 paths changed, 9 verified"),
        (str(none), f"failed (11): there is no image at {none}"),
        (str(trees[0]), "agent 0.1.0 injected: 9 paths changed, 9 verified"),
    ]
    assert "3 of 3" in done.stderr
    assert "next: check the path" in done.stderr
    assert done.stderr.endswith("vmprovision: 2 injected, 1 failed\n")
    for tree in trees:
        assert f"VM_ID={tree.name}-x\n" in (tree / "etc/guest-agent.conf").read_text()


def test_all_done_is_0(run_cli: RunCli, trees: list[Path]) -> None:
    """The exit code is 0 if images are injected and if they are unchanged."""
    assert "2 injected" in run_cli("inject", *trees, "--jobs", "2").stderr
    assert "2 unchanged" in run_cli("inject", *trees).stderr


def test_json(run_cli: RunCli, trees: list[Path], tmp_path: Path) -> None:
    """--json prints one object, with the report and the exit code of each image."""
    single = json.loads(run_cli("inject", trees[0], "--json").stdout)
    done = run_cli("-vv", "inject", *trees, tmp_path / "none", "--json", check=False)
    assert done.returncode == 3
    assert done.stdout.count("\n") == 1
    document = json.loads(done.stdout)
    assert document["exit_code"] == 3
    assert document["ok"] is False
    assert document["counts"]["injected"] == document["counts"]["unchanged"] == 1
    first, second, third = document["results"]
    assert [each["exit_code"] for each in document["results"]] == [0, 0, 11]
    assert first["report"].keys() == single.keys()
    assert first["report"]["image"] == first["image"] == str(trees[0])
    assert second["outcome"] == "injected"
    assert second["report"]["changed"] == single["changed"]
    assert third["error"]["kind"] == "ImageNotFoundError"
    assert third["report"] is None


def test_one_image_is_a_batch_where_an_option_of_batches_says_so(
    run_cli: RunCli, trees: list[Path]
) -> None:
    """With --jobs, one image gives the same JSON structure as several."""
    document = json.loads(run_cli("inject", trees[0], "--jobs", "1", "--json").stdout)
    assert [result["outcome"] for result in document["results"]] == ["injected"]
    document = json.loads(run_cli("inject", trees[0], "--vm-id", "{name}", "--json").stdout)
    assert document["changed"] == [
        "/etc/guest-agent.conf",
        "/usr/local/lib/guest-agent/receipt.json",
    ]
    assert "VM_ID=web.1\n" in (trees[0] / "etc/guest-agent.conf").read_text()


def test_junit(run_cli: RunCli, trees: list[Path], tmp_path: Path) -> None:
    """The JUnit file is complete, even if an image failed."""
    file = tmp_path / "reports" / "junit.xml"
    run_cli("inject", *trees, tmp_path / "none", "--report-junit", file, check=False)
    (suite,) = ET.parse(file).getroot().findall("testsuite")  # noqa: S314 -- our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "0")
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [*map(str, trees), str(tmp_path / "none")]
    assert all(re.fullmatch(r"\d+\.\d{3}", case.get("time") or "") for case in cases)
    (failure,) = suite.iter("failure")
    assert failure.get("type") == "ImageNotFoundError"
    assert failure.text == "next: check the path"
    (tmp_path / "file").write_text("")
    done = run_cli("inject", *trees, "--report-junit", tmp_path / "file/x", check=False)
    assert (done.returncode, done.stdout.count("nothing to do")) == (1, 2)


def test_junit_of_all_outcomes_and_hostile_names() -> None:
    """The document is valid XML whatever the names of the files are."""
    names = ["a\x00\x1b[31m", "b\udcff", "c<&\"'>]]>", "d\ufffe", "e"]
    results = (
        JobResult(image=Path(names[0]), outcome="skipped"),
        JobResult(image=Path(names[1]), outcome="cancelled"),
        JobResult(image=Path(names[2]), outcome="failed", error=ImageError("a\x01<", hint="\x02")),
        JobResult(image=Path(names[3]), outcome="failed", error=VmprovisionError("unexpected")),
        JobResult(image=Path(names[4]), outcome="failed", error=ImageError("m")),
    )
    root = ET.fromstring(junit_xml(BatchReport(results=results), seconds=1.5))  # noqa: S314 -- ours
    counts = {name: root.get(name) for name in ("tests", "failures", "errors", "skipped", "time")}
    assert counts == {
        "tests": "5",
        "failures": "2",
        "errors": "1",
        "skipped": "2",
        "time": "1.500",
    }
    assert [case.get("name") for case in root.iter("testcase")][2] == names[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{0}", "{0}"], "same file"),
        (["{0}", "{1}", "--vm-id", "a"], "{name}"),
        (["{0}", "{1}", "--port", "70000"], "port"),
        (["{0}", "{1}", "--output", "{0}/etc/os-release"], "directory"),
        (["{0}", "{1}", "--dry-run"], "--dry-run"),
        (["{0}", "--resume", "{0}/etc/os-release"], "journal"),
        (["{0}", "--scheduler", "tcp://127.0.0.1:9", "--jobs", "2"], "--jobs"),
        (["{0}", "--scheduler", "localhost"], "tcp://HOST:PORT"),
        (["{0}", "--jobs", "0"], "jobs"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    run_cli: RunCli, trees: list[Path], words: list[str], says: str
) -> None:
    """Contradictory options give one clear error before any work."""
    arguments = [word.format(*trees) for word in words]
    done = run_cli("inject", *arguments, "--json", check=False)
    assert done.returncode == 40
    error = json.loads(done.stdout)["error"]
    assert says in error["message"] + error["hint"]
    assert not any((tree / "etc/guest-agent.conf").exists() for tree in trees)


def test_the_display_on_a_terminal() -> None:
    """There is a bar for the batch, and one for each image until it is finished."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    display = BatchBars(2, console)
    images = [Path("/images/[bold]a.qcow2"), Path("/images/b\x1b.qcow2")]
    with display:
        for image in images:
            display.report(Progress(step="writing", fraction=0.5, image=image))
        display.report(Progress(step="injected", fraction=1.0, image=images[0], outcome="injected"))
    shown = screen.getvalue()
    last = shown.rpartition("[bold]a.qcow2")[2]
    assert "1 of 2" in shown
    assert "[bold]a.qcow2: writing" in shown
    assert "b\\x1b.qcow2: writing" in last
