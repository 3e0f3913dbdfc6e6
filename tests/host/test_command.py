"""Programs of the host end with all their children, and may clean up first."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from vmprovision.errors import CancelledError, CommandError
from vmprovision.host.command import run

WITH_A_CHILD = """
trap 'rm made; exit 1' TERM
touch made
sleep 1000 &
echo $! >child.new && mv child.new child
wait
"""
STUBBORN = """
trap '' TERM
echo $$ >child.new && mv child.new child
while :; do echo output; done
"""
LIMIT = 60.0


def has_ended(pid: int) -> bool:
    """Return whether there is no such process, or it only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended; fail the test if it does not."""
    deadline = time.monotonic() + LIMIT
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} runs on"
        time.sleep(0.02)


def cancel_when_there_is(path: Path) -> threading.Event:
    """Return an event that is set as soon as a file exists."""
    cancelled = threading.Event()

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        cancelled.set()

    threading.Thread(target=wait, daemon=True).start()
    return cancelled


def test_a_cancelled_program_cleans_up_and_ends_with_its_children(tmp_path: Path) -> None:
    """It gets SIGTERM and is waited for."""
    child = tmp_path / "child"
    cancelled = cancel_when_there_is(child)
    with pytest.raises(CancelledError):
        run(["sh", "-c", WITH_A_CHILD], timeout=LIMIT, folder=tmp_path, cancelled=cancelled)
    assert not (tmp_path / "made").exists()
    wait_for_end(int(child.read_text()))


def test_a_cancelled_program_that_goes_on_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a limited time to end, and its output is read meanwhile."""
    monkeypatch.setattr("vmprovision.host.command.ENDING_SECONDS", 0.5)
    child = tmp_path / "child"
    cancelled = cancel_when_there_is(child)
    with pytest.raises(CancelledError):
        run(["sh", "-c", STUBBORN], timeout=LIMIT, folder=tmp_path, cancelled=cancelled)
    assert has_ended(int(child.read_text()))


def test_a_program_that_does_not_end_in_time_is_killed_with_its_children(tmp_path: Path) -> None:
    """Its children would go on working for nobody."""
    with pytest.raises(CommandError, match="did not end within"):
        run(["sh", "-c", WITH_A_CHILD], timeout=5.0, folder=tmp_path)
    wait_for_end(int((tmp_path / "child").read_text()))
    assert (tmp_path / "made").exists()
