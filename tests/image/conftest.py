"""Real disks for the tests of this folder, and how a command must refuse one."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.conftest import require
from tests.image.layouts import Disks, cached_disks
from vmprovision import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import RunCli


@pytest.fixture(scope="session")
def disks() -> Disks:
    """Return the disks of ``layouts.py``, each made when it is first asked for."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    return cached_disks()


class Refuse(Protocol):
    """Sees a command refuse an image as it should."""

    def __call__(
        self, image: Path, code: int, *options: str | Path, command: str = "inject"
    ) -> dict[str, Any]:
        """Return the error as ``--json`` has it, after ``check_refusal``."""


@pytest.fixture
def refuse(run_cli: RunCli) -> Iterator[Refuse]:
    """Return a function that runs a command and expects an exit code and an untouched image."""

    def run(
        image: Path, code: int, *options: str | Path, command: str = "inject"
    ) -> dict[str, Any]:
        before = state_of(image)
        done = run_cli(command, image, "--json", *options, check=False)
        assert state_of(image) == before, "the image or what stands beside it changed"
        check_refusal(done.returncode, done.stdout, done.stderr, image, code)
        error: dict[str, Any] = json.loads(done.stdout)["error"]
        return error

    yield run  # noqa: PT022 -- nothing to undo


def check_refusal(returncode: int, stdout: str, stderr: str, image: Path, code: int) -> None:
    """Check that a refusal has its code, one clear message, one JSON object and no traceback."""
    assert "Traceback" not in stderr + stdout, stderr
    assert returncode == code, f"exit code {returncode}, should be {code}: {stderr}"
    assert "\x1b" not in stderr + stdout
    document = json.loads(stdout)
    assert document["exit_code"] == code
    error = document["error"]
    assert getattr(errors, error["kind"]).exit_code == code
    assert image.name in error["message"]
    assert error["hint"], f"no next step: {error}"
    assert stderr.count("error: ") == 1


def state_of(image: Path) -> dict[str, tuple[str, int, int]]:
    """Return content, mode and time of the image and of everything beside it."""
    return {
        path.name: (file_hash(path), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in sorted(image.parent.iterdir())
        if path.is_file()
    }


def file_hash(path: Path) -> str:
    """Return SHA-256 of a file of the host."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
