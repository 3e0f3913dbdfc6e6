"""A power cut in the middle of a merge: recover completes it, whatever was synced."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.crash.powercut import possible_states, read_record, recording_qemu_img
from tests.image.tiny import tiny_disk

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli

pytestmark = pytest.mark.appliance

EACH = 4  # states between two flushes
SEED = 5
CHECKED = 6  # of the states are also verified by an appliance


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_power_cut(disk_format: str, tmp_path: Path, run_cli: RunCli) -> None:
    """Every state that the disk can be left in recovers to a whole and verified image."""
    kept, images = tmp_path / "kept", tmp_path / "images"
    kept.mkdir()
    images.mkdir()
    image = images / f"guest.{disk_format}"
    raw = tiny_disk(tmp_path / "tiny.raw", {})
    convert = ["qemu-img", "convert", "-f", "raw", "-O", disk_format]
    subprocess.run([*convert, raw, image], check=True)
    source = vmprovision.ImageOptions(format=disk_format)
    before = image.read_bytes()
    path = f"{recording_qemu_img(kept, images)}:{os.environ['PATH']}"
    run_cli("inject", image, "--format", disk_format, env={"PATH": path})
    (redo_log,) = kept.glob("*.vmprovision-merging")
    epochs = read_record(kept / "log")
    assert sum(map(len, epochs)) > 1, "the merge was not recorded"
    states = list(possible_states(before, epochs, random.Random(SEED), EACH))
    verified = set(random.Random(SEED).sample(range(len(states)), min(CHECKED, len(states))))
    for number, state in enumerate(states):
        with image.open("r+b") as file:  # the same file: the redo log knows its inode
            file.truncate(len(state))
            file.write(state)
        shutil.copy2(redo_log, images / redo_log.name)
        assert vmprovision.recover(image, source=source) == "merged"
        assert whole(image, disk_format, tmp_path / "judged.raw") == "", f"state {number}"
        assert [entry.name for entry in images.iterdir()] == [image.name]
        if number in verified:
            assert vmprovision.verify(image, source=source).mismatches == ()


def whole(image: Path, disk_format: str, raw: Path) -> str:
    """Return what the tools of image and filesystem find wrong; empty if nothing."""
    commands: list[list[str | Path]] = []
    if disk_format == "qcow2":
        commands += [
            ["qemu-img", "check", "-q", image],
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw],
        ]
    commands.append(["e2fsck", "-fn", raw if commands else image])
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        if done.returncode:
            return f"{command[0]}: {done.stdout}{done.stderr}"
    return ""
