"""The cache: who may write to it, and how things are built into it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from vmprovision.host.cache import build_directory, make_private, require_private

if TYPE_CHECKING:
    from pathlib import Path


def no_wait() -> None:
    """Fail a build that has to wait."""
    pytest.fail("another process builds it")


def test_a_build_directory_is_private_and_removed(tmp_path: Path) -> None:
    """It is empty, only its owner can enter it, and it is removed whatever happens."""
    target = tmp_path / "cache" / "thing-1.2.qcow2"
    with pytest.raises(ZeroDivisionError), build_directory(target, no_wait) as directory:
        check_empty(directory, target)
    assert [path.name for path in target.parent.iterdir()] == ["thing-1.2.lock"]


def check_empty(directory: Path, target: Path) -> None:
    """Check a build directory, put a file into it, and fail."""
    assert directory.parent == target.parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not list(directory.iterdir())
    (directory / "file").write_bytes(b"x")
    raise ZeroDivisionError


def test_what_is_built_can_be_moved_to_its_name(tmp_path: Path) -> None:
    """A directory becomes the target by a rename."""
    target = tmp_path / "thing"
    with build_directory(target, no_wait) as directory:
        (directory / "file").write_bytes(b"x")
        directory.rename(target)
    assert (target / "file").read_bytes() == b"x"


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    """The lock of a killed process is free, and its directory is removed."""
    target = tmp_path / "thing"
    code = (
        "import os, signal, sys, pathlib\n"
        "from vmprovision.host.cache import build_directory\n"
        "with build_directory(pathlib.Path(sys.argv[1]), lambda: None) as directory:\n"
        "    (directory / 'file').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, target], check=False, timeout=60)
    (abandoned,) = tmp_path.glob("*.building")
    other = tmp_path / "thing-else-1.building"
    other.mkdir()
    with build_directory(tmp_path / "another", no_wait):
        assert abandoned.exists(), "it belongs to another target"
    with build_directory(target, no_wait) as directory:
        assert not abandoned.exists()
        assert directory.exists()


def test_a_second_builder_waits(tmp_path: Path) -> None:
    """It gets its directory when the first builder has ended."""
    target = tmp_path / "thing"
    waited = threading.Event()
    ended: list[float] = []

    def build() -> None:
        with build_directory(target, waited.set):
            ended.append(time.monotonic())

    with build_directory(target, no_wait):
        second = threading.Thread(target=build)
        second.start()
        assert waited.wait(60)
        first_ended = time.monotonic()
        assert not ended
    second.join(60)
    assert ended[0] >= first_ended


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_directory_that_others_can_write_to_is_not_private(tmp_path: Path, mode: int) -> None:
    """Neither its group nor others may write to it, and it must belong to this user."""
    folder = tmp_path / "a" / "b"
    make_private(folder)
    require_private(folder, folder.parent)
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="can be written by others"):
        require_private(folder.parent, folder)
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="not a directory of this user"):
        require_private(tmp_path / "file")
    if os.geteuid() == 0:
        folder.chmod(0o700)
        os.chown(folder, 65534, 65534)
        with pytest.raises(PermissionError, match="not a directory of this user"):
            require_private(folder)
