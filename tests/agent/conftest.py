"""Shared agents: one of each interpreter serves all tests that only talk to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .agents import Agent, build_program, running_agent
from .interpreters import Interpreter, get_interpreter, interpreter_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", params=interpreter_names())
def interpreter(request: pytest.FixtureRequest) -> Interpreter:
    """Return every interpreter in turn."""
    return get_interpreter(request.param)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the agent's file; all interpreters run the same one."""
    return build_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="session")
def agent(
    interpreter: Interpreter, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """Yield an agent without a manager, for all tests of one interpreter."""
    with running_agent(interpreter, program, tmp_path_factory.mktemp("agent")) as running:
        yield running
