"""Batches through the library, on directories: results, refusals, isolation."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, make_tree, tree_state
from vmprovision import errors
from vmprovision.appliance.session import ApplianceCallError

GUESTS = ("vm-1", "vm-2", "vm-3")


@pytest.fixture
def trees(tmp_path: Path) -> list[Path]:
    """Three guests."""
    return [make_tree(tmp_path / name, SYSTEMD_TREE) for name in GUESTS]


def vm_id_in(tree: Path) -> str:
    """Return the VM id in a guest."""
    lines = (tree / "etc/guest-agent.conf").read_text().splitlines()
    return next((line.partition("=")[2] for line in lines if line.startswith("VM_ID=")), "")


def outcomes(report: vmprovision.BatchReport) -> list[str]:
    """Return the outcomes of the images, in order."""
    return [result.outcome for result in report.results]


def test_one_result_for_each_image_in_the_order_given(trees: list[Path], tmp_path: Path) -> None:
    """An image that fails does not stop the others, and its error names the cause."""
    (tmp_path / "empty").mkdir()
    images = [trees[2], tmp_path / "empty", trees[0], tmp_path / "none.qcow2", trees[1]]
    report = vmprovision.inject_many(images, jobs=2)
    assert [result.image for result in report.results] == images
    assert outcomes(report) == ["injected", "failed", "injected", "failed", "injected"]
    assert isinstance(report.results[1].error, errors.NoOperatingSystemError)
    assert isinstance(report.results[3].error, errors.ImageNotFoundError)
    assert not report.ok
    assert report.count("injected") == 3
    again = vmprovision.inject_many([str(tree) for tree in trees])
    assert outcomes(again) == ["unchanged"] * 3
    assert again.ok
    assert all(result.report and result.report.verified for result in again.results)


def test_a_batch_does_what_single_calls_do(trees: list[Path], tmp_path: Path) -> None:
    """A batch leaves the same bytes, modes and owners in a guest as a single injection."""
    alone = make_tree(tmp_path / "alone", SYSTEMD_TREE)
    options = vmprovision.InjectOptions(manager_url="http://192.0.2.1:3000", port=81)
    vmprovision.inject(alone, options)
    vmprovision.inject_many(trees, options)
    assert [tree_state(tree) for tree in trees] == [tree_state(alone)] * 3


def test_each_image_has_options_of_its_own(trees: list[Path]) -> None:
    """A function returns the options for each image."""
    ids = {tree: f"id-of-{tree.name}" for tree in trees}
    vmprovision.inject_many(trees, lambda image: vmprovision.InjectOptions(vm_id=ids[image]))
    assert [vm_id_in(tree) for tree in trees] == list(ids.values())


def test_two_names_of_one_image_are_refused_before_any_work(
    trees: list[Path], tmp_path: Path
) -> None:
    """An image that is given twice is refused: by the same path, a link, or a hard link."""
    (tmp_path / "link").symlink_to(trees[0])
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    (tmp_path / "hard.raw").hardlink_to(disk)
    before = [tree_state(tree) for tree in trees]
    for twice in (
        [trees[0], trees[0]],
        [trees[1], trees[0], tmp_path / "link"],
        [trees[0], disk, tmp_path / "hard.raw"],
        [trees[0], tmp_path / "none", tmp_path / "none"],
    ):
        with pytest.raises(vmprovision.PlanError, match="same file"):
            vmprovision.inject_many(twice)
    assert [tree_state(tree) for tree in trees] == before


def test_invalid_options_are_refused_before_any_work(trees: list[Path], tmp_path: Path) -> None:
    """A shared VM id, an invalid setting and an invalid output directory are refused."""
    before = [tree_state(tree) for tree in trees]
    with pytest.raises(vmprovision.PlanError, match="same VM id"):
        vmprovision.inject_many(trees, vmprovision.InjectOptions(vm_id="a"))
    with pytest.raises(vmprovision.PlanError, match="port"):
        vmprovision.inject_many(trees, vmprovision.InjectOptions(port=70000))
    with pytest.raises(vmprovision.PlanError, match="not a directory"):
        vmprovision.inject_many(trees, output=tmp_path / "none")
    with pytest.raises(vmprovision.PlanError, match="at least 1, not 0"):
        vmprovision.inject_many(trees, jobs=0)
    (tmp_path / "other").mkdir()
    twin = make_tree(tmp_path / "other" / trees[0].name, SYSTEMD_TREE)
    with pytest.raises(vmprovision.PlanError, match="same new file"):
        vmprovision.inject_many([trees[0], twin], output=tmp_path)
    assert [tree_state(tree) for tree in trees] == before


def test_a_wrong_wish_for_one_image_fails_that_one(trees: list[Path]) -> None:
    """If a file's name gives an invalid VM id, only that image fails."""
    report = vmprovision.inject_many(
        trees,
        lambda image: vmprovision.InjectOptions(vm_id="a b" if image == trees[1] else image.name),
    )
    assert outcomes(report) == ["injected", "failed", "injected"]
    assert isinstance(report.results[1].error, vmprovision.PlanError)
    assert "vm-2" in report.results[1].error.message


def test_a_fault_of_ours_is_a_result_and_told_from_failures(trees: list[Path]) -> None:
    """An unexpected exception in one image does not affect the others."""

    def options(image: Path) -> vmprovision.InjectOptions:
        unthought_of = Path("\0") if image == trees[0] else "auto"
        return vmprovision.InjectOptions(runtime=unthought_of)  # type: ignore[arg-type]

    report = vmprovision.inject_many(trees, options)
    assert outcomes(report) == ["failed", "injected", "injected"]
    assert report.results[0].is_fault
    assert report.results[0].error
    assert "unexpected ValueError" in report.results[0].error.message
    assert "report it" in report.results[0].error.hint


def test_progress_names_the_image_and_comes_one_call_at_a_time(trees: list[Path]) -> None:
    """Each image's steps are reported, and its outcome once, with the last step."""
    seen: list[vmprovision.Progress] = []
    busy = threading.Lock()

    def report(progress: vmprovision.Progress) -> None:
        assert busy.acquire(blocking=False), "two calls at once"
        seen.append(progress)
        busy.release()

    vmprovision.inject_many(trees, jobs=3, control=vmprovision.Control(report=report))
    for tree in trees:
        of_it = [progress for progress in seen if progress.image == tree]
        assert "verifying" in [progress.step for progress in of_it]
        assert [progress.outcome for progress in of_it if progress.outcome] == ["injected"]
        assert of_it[-1].outcome == "injected"


def test_cancelling_starts_no_more(trees: list[Path]) -> None:
    """Finished images stay finished, the others stay unchanged, and each has its result."""
    before = tree_state(trees[2])
    control = vmprovision.Control()

    def cancel_after_the_first(progress: vmprovision.Progress) -> None:
        if progress.outcome == "injected":
            control.cancelled.set()

    control.report = cancel_after_the_first
    gate = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        class Stuck(concurrent.futures.Executor):
            """Do one job, then nothing for a long time."""

            def submit(self, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN002, ANN003, ANN202
                future = pool.submit(*args, **kwargs)
                pool.submit(gate.wait, 60)
                return future

        begun = time.monotonic()
        report = vmprovision.inject_many(trees, executor=Stuck(), control=control)
        assert time.monotonic() - begun < 30
        gate.set()
    assert outcomes(report) == ["injected", "cancelled", "cancelled"]
    assert isinstance(report.results[1].error, vmprovision.CancelledError)
    assert tree_state(trees[2]) == before


@pytest.mark.usefixtures("trees")
def test_workers_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and results survive pickling, and results name the images as given."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    images = [*(Path(name) for name in GUESTS), Path("none.qcow2")]
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        pool.submit(os.chdir, "/").result()
        report = vmprovision.inject_many(images, executor=pool)
        assert pool.submit(os.getpid).result() != os.getpid()  # it is the caller's to shut down
    assert outcomes(report) == ["injected"] * 3 + ["failed"]
    assert [result.image for result in report.results] == images
    assert [result.report.image for result in report.results if result.report] == images[:3]
    assert isinstance(report.results[3].error, errors.ImageNotFoundError)


def test_an_executor_that_breaks_fails_its_images(trees: list[Path]) -> None:
    """A lost worker is reported as FleetError, not as a fault of the image."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        lost = pool.submit(os._exit, 1)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            lost.result()
        report = vmprovision.inject_many(trees, executor=pool)
    assert outcomes(report) == ["failed"] * 3
    assert all(isinstance(result.error, vmprovision.FleetError) for result in report.results)


ERRORS = [
    errors.VerificationError("m", mismatches=["/etc/a: differs"], hint="h"),
    errors.ProofError("m", console=["Kernel panic"], hint="h"),
    errors.CommandError("m", stderr="e", hint="h"),
    ApplianceCallError("m", number=28),
    errors.ImageLockedError("m", hint="h"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_travel(error: vmprovision.VmprovisionError) -> None:
    """An error keeps all its attributes when it returns from another process."""
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 -- of this test
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert str(back) == str(error)
    assert back.as_json() == error.as_json()


def test_tokens_are_in_no_log() -> None:
    """The repr of options, which executors may log, shows no token."""
    options = vmprovision.InjectOptions(token="abcdef0123456789", read_token="fedcba9876543210")
    assert "abcdef" not in repr(options)
    assert "fedcba" not in repr(options)


def test_the_example_of_the_documentation_runs(trees: list[Path], tmp_path: Path) -> None:
    """The batch in docs/batches.md injects its images and reports what failed."""
    text = (Path(__file__).parents[2] / "docs" / "batches.md").read_text()
    (code,) = re.findall(r"```python\n# batch\.py\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "batch.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, *map(str, trees), str(tmp_path / "none")],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"{tree} injected " for tree in trees]
    assert "none failed there is no image" in lines[3]
    assert [vm_id_in(tree) for tree in trees] == [f"vm-{name}" for name in GUESTS]
