"""Batches of real disks: interrupted and resumed, backing files, new images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.conftest import file_hash, state_of
from tests.image.test_crashes import machine_runs, machines_on, wait_until
from tests.image.tiny import tiny_disk
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli

pytestmark = pytest.mark.appliance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two small guests, and an overlay over one of them."""
    disks = tmp_path / "disks"
    disks.mkdir()
    made = tiny_disk(tmp_path / "tiny.raw", {})
    for name in ("a", "base"):
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", made, disks / name], check=True)
        (disks / name).rename(disks / f"{name}.qcow2")
    subprocess.run(
        [
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
            *("-b", "base.qcow2", disks / "over.qcow2"),
        ],
        check=True,
    )
    return disks


def test_interrupted_and_resumed(folder: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """After Ctrl-C, finished images are reported and recorded; the next run does the others.

    The backing file is refused in either run, and as it was in the end.
    """
    images = [folder / "a.qcow2", folder / "base.qcow2", folder / "over.qcow2"]
    base = file_hash(images[1])
    words = ["inject", *map(str, images), "--jobs", "1", "--resume", str(tmp_path / "journal")]
    batch = subprocess.Popen(
        [sys.executable, "-m", "vmprovision", *words, "--vm-id", "{name}", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, STOCK_VARIABLE: "1"},  # takes long enough to be interrupted in
    )
    try:
        wait_until(lambda: batch.poll() is not None or machine_runs(images[2]))
        before = state_of(images[2])
        batch.send_signal(signal.SIGINT)
        output, told = batch.communicate(timeout=30)
    finally:
        batch.kill()
    assert batch.returncode == 130, told
    first = json.loads(output)["results"]
    assert [result["outcome"] for result in first] == ["injected", "failed", "cancelled"]
    assert first[1]["exit_code"] == 17
    assert "over.qcow2" in first[1]["error"]["message"]
    untouched = {name: state for name, state in before.items() if name.endswith(".qcow2")}
    assert state_of(images[2]) == untouched
    wait_until(lambda: not machines_on(folder), 15)

    done = run_cli(*words, "--vm-id", "{name}", check=False)
    assert done.returncode == 3
    assert [line.partition(": ")[2][:13] for line in done.stdout.splitlines()] == [
        "skipped: done",
        "failed (17): ",
        "agent 0.1.0 i",
    ]
    assert "injected" in done.stderr
    assert file_hash(images[1]) == base
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in images]


def test_new_images(folder: Path, tmp_path: Path) -> None:
    """--output leaves images unchanged, even a backing file; a resumed run skips finished ones."""
    images, new = sorted(folder.iterdir()), tmp_path / "new"
    before = state_of(images[0])
    new.mkdir()
    shutil.copy(images[0], new)  # what is there already is not replaced
    journal = tmp_path / "journal"
    report = vmprovision.inject_many(images, output=new, journal=journal)
    assert [result.outcome for result in report.results] == ["failed", "injected", "injected"]
    assert [result.report.image for result in report.results if result.report] == [
        new / "base.qcow2",
        new / "over.qcow2",
    ]
    assert state_of(images[0]) == before
    (new / "a.qcow2").unlink()
    report = vmprovision.inject_many(images, output=new, journal=journal)
    assert [result.outcome for result in report.results] == ["injected", "skipped", "skipped"]
    assert sorted(path.name for path in new.iterdir()) == [path.name for path in images]


def test_together(folder: Path) -> None:
    """One appliance works on several images as if on each alone; a broken image stops no other."""
    images = [folder / "a.qcow2", folder / "broken.qcow2", folder / "base.qcow2"]
    shutil.copy(images[0], images[1])
    with images[1].open("r+b") as file:
        file.truncate(70_000)
    (folder / "over.qcow2").unlink()
    report = vmprovision.inject_many(images, jobs=1, together=True)
    assert [result.outcome for result in report.results] == ["injected", "failed", "injected"]
    for image in (images[0], images[2]):
        assert not vmprovision.verify(image).mismatches
    again = vmprovision.inject_many(images[::2], jobs=2, together=True)
    assert [result.outcome for result in again.results] == ["unchanged"] * 2
    assert not machines_on(folder)


def test_together_is_for_this_host(folder: Path, run_cli: RunCli) -> None:
    """--together is refused with an executor, whose workers share no appliance."""
    words = ("--together", "--scheduler", "tcp://127.0.0.1:1")
    done = run_cli("inject", folder / "a.qcow2", *words, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
