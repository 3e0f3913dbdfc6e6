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
    """Every interpreter in turn."""
    return get_interpreter(request.param)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent's file; all interpreters run the same."""
    return build_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="session")
def agent(
    interpreter: Interpreter, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """An agent without a manager that lives as long as its interpreter's turn."""
    with running_agent(interpreter, program, tmp_path_factory.mktemp("agent")) as running:
        yield running
