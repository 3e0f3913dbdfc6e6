"""The agent's pure functions give every interpreter the same results."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require

from .agents import SOURCE

if TYPE_CHECKING:
    from .interpreters import Interpreter

SCRIPT = Path(__file__).parent / "portable.py"
SAMPLES = Path(__file__).parent / "samples"
# Services have no locale, where an old CPython decodes ASCII only.
SERVICE = {"LC_ALL": "C", "PORTABLE": "w\xe9b", "PORTABLE_BAD": "w\udce9b"}


def run_script(argv: tuple[str, ...], folder: Path) -> str:
    """Return what the script prints under an interpreter."""
    names = sorted(sample.name for sample in SAMPLES.iterdir())
    run = subprocess.run(
        [*argv, str(SCRIPT), str(folder), str(SAMPLES), *names],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **SERVICE},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_results_do_not_depend_on_the_interpreter(interpreter: Interpreter, tmp_path: Path) -> None:
    """Parsing and writing give the same bytes everywhere."""
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE, tmp_path / "guest_agent", ignore=unwanted)
    expected = run_script((sys.executable, "-S", "-E", "-s"), tmp_path)
    assert len(expected.splitlines()) > 20
    assert 'environment ["w\\u00e9b",true]\n' in expected
    assert run_script(interpreter.argv, tmp_path) == expected


def test_the_language_is_one_that_vermin_accepts() -> None:
    """Every module runs on 2.6 and 3.0."""
    require(find_spec("vermin"), "vermin is not installed")
    modules = [str(module) for module in SOURCE.glob("*.py")]
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vermin import main; main()",
            "-t=2.6-",
            "-t=3.0-",
            "--no-tips",
            *modules,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "could not be combined" not in run.stdout, "a module was not looked at"


def test_only_modules_that_every_guest_has() -> None:
    """The source is ASCII and imports nothing that python3-minimal or MicroPython may lack."""
    allowed = {
        "errno",
        "os",
        "select",
        "sys",
        "time",
        "fcntl",
        "signal",
        "_guest",  # the runtime's own, asked for by compat.py
        "_signal",
        "_socket",
        "socket",
    }
    for module in sorted(SOURCE.glob("*.py")):
        text = module.read_text()
        assert text.isascii(), module
        imported = set(re.findall(r"^ *(?:import|from) +([\w]+)", text, flags=re.MULTILINE))
        assert imported <= allowed, (module, imported - allowed)
