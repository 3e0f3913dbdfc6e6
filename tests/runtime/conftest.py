"""The runtime of this host's architecture, which the first test that needs it builds."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol

import pytest

from tests.agent.interpreters import MICROPYTHON, get_interpreter

TIME_LIMIT = 60.0


class RunRuntime(Protocol):
    """Run the runtime with these arguments."""

    def __call__(
        self, *args: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Return the finished process, whatever its status."""


@pytest.fixture(scope="session")
def runtime() -> Path:
    """Return the runtime's file."""
    return Path(get_interpreter(MICROPYTHON).argv[0])


@pytest.fixture(scope="session")
def run_runtime(runtime: Path) -> RunRuntime:
    """Return a function that runs the runtime."""

    def run(
        *args: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [runtime, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=TIME_LIMIT,
            env=env,
            cwd=cwd,
        )

    return run
