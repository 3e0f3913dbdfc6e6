"""Others in the image's folder: files that are swapped, planted or made twice while we work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.conftest import file_hash, state_of
from tests.image.tiny import tiny_disk
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE
from vmprovision.errors import (
    ImageError,
    ImageLockedError,
    ImageRecoveryError,
    VmprovisionError,
)
from vmprovision.image.redolog import MERGING, OPEN, SEALED

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.image.conftest import Refuse

pytestmark = pytest.mark.appliance

STEPS = ["starting the appliance", "inspecting the guest", "verifying", "merging the redo log"]
PATIENCE = 240.0
PLANTED = {"data file", "backing", "no json", "network", "plain", "pipe"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one small guest in two formats, for reading only."""
    folder = tmp_path_factory.mktemp("tiny")
    raw = tiny_disk(folder / "guest.raw", {})
    qcow2 = folder / "guest.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, qcow2], check=True)
    return {"raw": raw, "qcow2": qcow2}


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tiny: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of the small guest, alone in a folder."""
    (tmp_path / "images").mkdir()
    kind = request.param
    return Path(shutil.copy(tiny[kind], tmp_path / "images" / f"disk.{kind}"))


def at_step(wanted: str, act: Callable[[], object]) -> vmprovision.Control:
    """Return a control that does something once, when a step begins."""
    done: list[str] = []

    def report(progress: vmprovision.Progress) -> None:
        if progress.step == wanted and not done:
            done.append(wanted)
            act()

    return vmprovision.Control(report=report)


@pytest.mark.parametrize("how", ["moved", "link"])
@pytest.mark.parametrize("step", STEPS)
def test_image_that_is_replaced(image: Path, tmp_path: Path, step: str, how: str) -> None:
    """A file that replaces the image at any moment is not touched, and the run reports an error."""
    other = Path(shutil.copy(image, tmp_path / f"other{image.suffix}"))
    with other.open("r+b") as file:  # another content, by which it is known
        file.seek(-4, os.SEEK_END)
        file.write(b"mine")
    wanted, original = file_hash(other), file_hash(image)
    kept = tmp_path / "kept"

    def replace() -> None:
        image.rename(kept)
        if how == "link":
            image.symlink_to(other)
        else:
            other.rename(image)

    with pytest.raises(ImageError, match="replaced"):
        vmprovision.inject(image, control=at_step(step, replace))
    assert file_hash(image) == wanted
    assert file_hash(kept) == original
    assert [path.name for path in image.parent.iterdir()] == [image.name]


@pytest.mark.parametrize(
    ("image", "stock"),
    [
        ("raw", False),
        ("qcow2", False),
        ("raw", True),
        pytest.param("qcow2", True, marks=pytest.mark.slow),
    ],
    indirect=["image"],
)
def test_redo_log_that_is_replaced(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stock: bool
) -> None:
    """A redo log that somebody swaps is neither written nor merged."""
    if stock:
        monkeypatch.setenv(STOCK_VARIABLE, "1")
    before, log = file_hash(image), image.with_name(image.name + OPEN)
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * (1 << 20))

    def replace() -> None:
        log.unlink()
        log.symlink_to(secret)

    with pytest.raises(VmprovisionError):
        vmprovision.inject(image, control=at_step("starting the appliance", replace))
    assert file_hash(image) == before
    assert secret.read_bytes() == b"s" * (1 << 20)


def test_image_that_is_replaced_while_it_is_merged(image: Path, tmp_path: Path) -> None:
    """The file that was locked is finished where it is now; the other one is not touched."""
    other = Path(shutil.copy(image, tmp_path / "other"))
    wanted, kept = file_hash(other), tmp_path / f"kept{image.suffix}"
    program = tmp_path / "bin" / "qemu-img"
    program.parent.mkdir()
    real = shutil.which("qemu-img")
    program.write_text(
        f'#!/bin/sh\n[ "$1" != commit ] || {{ mv {image} {kept}; mv {other} {image}; }}\n'
        f'exec {real} "$@"\n'
    )
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "vmprovision", "inject", "--json", image],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 10, done.stderr
    assert "while the redo log was merged" in error["message"]
    assert file_hash(image) == wanted
    assert vmprovision.verify(kept).mismatches == ()


def overlay(path: Path, size: str, *options: str) -> Path:
    """Return a qcow2 that anybody can make."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size], check=True)
    return path


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *product(["inspect", "recover"], sorted(PLANTED)),
        *product(["inject"], sorted(PLANTED - {"backing", "network"})),  # as inspect has it
    ],
)
@pytest.mark.parametrize("suffix", [MERGING, SEALED])
def test_planted_redo_log(  # noqa: PLR0913, PLR0917 -- three parameters and what they need
    tiny: dict[str, Path], tmp_path: Path, refuse: Refuse, command: str, suffix: str, kind: str
) -> None:
    """A file of a redo log's name that this host has not sealed is named and refused, unopened."""
    image = Path(shutil.copy(tiny["raw"], tmp_path / "disk.raw"))
    status = image.stat()
    end = f"-{status.st_size}-{status.st_mtime_ns}" if suffix == SEALED else ""
    planted = image.with_name(image.name + suffix + end)
    secret = tmp_path / "elsewhere" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"s" * status.st_size)
    size = str(status.st_size)
    if kind == "data file":
        overlay(planted, size, "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
        (tmp_path / "data").unlink()
        (tmp_path / "data").symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(planted)
    elif kind == "plain":
        overlay(planted, size)
    else:
        names = {"backing": str(secret), "no json": "json:{", "network": "nbd:127.0.0.1:1"}
        overlay(planted, size, "-u", "-F", "raw", "-b", names[kind])
    error = refuse(image, 18, command=command)
    assert planted.name in error["message"]
    assert "--trust-redo-log" in error["hint"]
    assert secret.read_bytes() == b"s" * status.st_size


def sealed_copy(tiny: dict[str, Path], folder: Path) -> Path:
    """Return an image with a real sealed redo log beside it."""
    image = Path(shutil.copy(tiny["raw"], folder / "disk.raw"))
    program = folder / "bin" / "qemu-img"
    program.parent.mkdir()
    real = shutil.which("qemu-img")
    program.write_text(f'#!/bin/sh\n[ "$1" != commit ] || exit 1\nexec {real} "$@"\n')
    program.chmod(0o755)
    subprocess.run(
        [sys.executable, "-m", "vmprovision", "inject", image],
        check=False,
        capture_output=True,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    status = image.stat()
    image.with_name(image.name + MERGING).rename(
        image.with_name(f"{image.name}{SEALED}-{status.st_size}-{status.st_mtime_ns}")
    )
    return image


def test_redo_log_of_another_host(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the key a redo log is refused, changed in one bit too, and merged where trusted."""
    image = sealed_copy(tiny, tmp_path)
    (log,) = tmp_path.glob(f"*{SEALED}*")
    content = log.read_bytes()
    log.write_bytes(content[:70000] + bytes([content[70000] ^ 1]) + content[70001:])
    with pytest.raises(ImageRecoveryError, match="was not sealed"):
        vmprovision.recover(image)
    log.write_bytes(content)
    monkeypatch.setenv("VMPROVISION_STATE", str(tmp_path / "another"))
    before = state_of(image)
    with pytest.raises(ImageRecoveryError, match="was not sealed"):
        vmprovision.inspect(image)
    assert state_of(image) == before
    assert vmprovision.recover(image, trust=True) == "merged"
    assert vmprovision.verify(image).mismatches == ()


def test_a_sealed_redo_log_names_nothing(tiny: dict[str, Path], tmp_path: Path) -> None:
    """QEMU reports a disk with no other file."""
    sealed_copy(tiny, tmp_path)
    (log,) = tmp_path.glob(f"*{SEALED}*")
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", log], check=True, capture_output=True
    )
    assert not {key for key in json.loads(told.stdout) if "backing" in key or "data" in key}


def test_merging_into_another_image(tiny: dict[str, Path], tmp_path: Path) -> None:
    """A redo log that was being merged is not merged into what stands there instead."""
    image = sealed_copy(tiny, tmp_path)
    (log,) = tmp_path.glob(f"*{SEALED}*")
    log.rename(image.with_name(image.name + MERGING))
    other = Path(shutil.copy(image, tmp_path / "other"))
    os.utime(other)
    other.rename(image)
    before = file_hash(image)
    with pytest.raises(ImageRecoveryError, match="another file"):
        vmprovision.recover(image)
    assert file_hash(image) == before


def test_two_runs_with_one_output(tiny: dict[str, Path], tmp_path: Path) -> None:
    """One makes the new image; the other is refused at once, and both say the truth."""
    output = tmp_path / "new.qcow2"
    works, go = threading.Event(), threading.Event()

    def wait() -> None:
        works.set()
        go.wait(PATIENCE)

    results: list[object] = []

    def first() -> None:
        with contextlib.suppress(VmprovisionError):
            control = at_step("verifying", wait)
            results.append(vmprovision.inject(tiny["qcow2"], output=output, control=control))

    thread = threading.Thread(target=first)
    thread.start()
    assert works.wait(PATIENCE)
    with pytest.raises(ImageLockedError, match="another run"):
        vmprovision.inject(tiny["raw"], output=output)
    go.set()
    thread.join(PATIENCE)
    assert results
    assert vmprovision.verify(output).mismatches == ()
    assert [path.name for path in tmp_path.iterdir()] == ["new.qcow2"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_output_is_as_private_as_its_source(
    tiny: dict[str, Path], tmp_path: Path, mode: int
) -> None:
    """Only users who may read the old image may read the new one."""
    source = Path(shutil.copy(tiny["qcow2"], tmp_path / "old.qcow2"))
    source.chmod(mode)
    output = tmp_path / "new.vmdk"
    seen: list[int] = []

    def look() -> None:
        seen.extend(path.stat().st_mode & 0o077 for path in tmp_path.glob("new*"))

    vmprovision.inject(source, output=output, control=at_step("writing the new image", look))
    assert seen == [0]
    assert output.stat().st_mode & 0o777 & ~mode == 0
    assert vmprovision.verify(output).mismatches == ()


def test_output_where_a_killed_run_left_something(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The leftover of a killed run for the same new image is removed."""
    output = tmp_path / "new.raw"
    (tmp_path / f"new.raw{OPEN}").write_bytes(b"left")
    (tmp_path / "new.raw.vmprovision-new").mkdir()
    (tmp_path / "new.raw.vmprovision-new" / "new.raw").write_bytes(b"left")
    vmprovision.inject(tiny["raw"], output=output)
    assert vmprovision.verify(output).mismatches == ()
    assert [path.name for path in tmp_path.iterdir()] == ["new.raw"]


def test_link_in_the_place_of_the_redo_log(tiny: dict[str, Path], tmp_path: Path) -> None:
    """A link that lies where the redo log of --output is to be is not followed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f"new.raw{OPEN}").symlink_to(victim)
    with pytest.raises(ImageError, match="exists, and the redo log"):
        vmprovision.inject(tiny["raw"], output=tmp_path / "new.raw")
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", [b"bad\xff.raw", b"bad\xff.qcow2", b"with, comma:colon.raw"])
def test_image_with_any_name(tiny: dict[str, Path], tmp_path: Path, name: bytes) -> None:
    """A name that is not UTF-8, or that means something to QEMU, is a name."""
    image = tmp_path / os.fsdecode(name)
    shutil.copy(tiny[image.suffix[1:]], image)
    assert vmprovision.inject(image).changed
    assert vmprovision.verify(image).mismatches == ()
    output = tmp_path / os.fsdecode(b"new-" + name)
    vmprovision.inject(image, output=output)
    assert vmprovision.verify(output).mismatches == ()


@pytest.mark.parametrize(
    "name",
    [
        b"bad\xff, comma:colon.raw",
        pytest.param(b"bad\xff, comma:colon.qcow2", marks=pytest.mark.slow),
    ],
)
def test_stock_appliance_and_any_name(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    """Neither does libguestfs make anything else of it."""
    image = tmp_path / os.fsdecode(name)
    shutil.copy(tiny[image.suffix[1:]], image)
    monkeypatch.setenv(STOCK_VARIABLE, "1")
    assert vmprovision.inject(image).changed
    monkeypatch.delenv(STOCK_VARIABLE)
    assert vmprovision.verify(image).mismatches == ()
