"""Shared agents: one of each interpreter serves all tests that only talk to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .agents import Agent, build_folder, build_zip, running_agent
from .interpreters import Interpreter, get_interpreter, interpreter_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", params=interpreter_names())
def interpreter(request: pytest.FixtureRequest) -> Interpreter:
    """Every interpreter in turn."""
    return get_interpreter(request.param)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The agent as MicroPython (True) and as CPython (False) run it."""
    folder = tmp_path_factory.mktemp("program")
    return {True: build_folder(folder), False: build_zip(folder)}


@pytest.fixture(scope="session")
def program(interpreter: Interpreter, programs: dict[bool, Path]) -> Path:
    """The agent as this interpreter runs it."""
    return programs[interpreter.is_micropython]


@pytest.fixture(scope="session")
def agent(
    interpreter: Interpreter, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """An agent without a manager that lives as long as its interpreter's turn."""
    with running_agent(interpreter, program, tmp_path_factory.mktemp("agent")) as running:
        yield running
