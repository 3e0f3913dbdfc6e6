"""Run the steps of a composite action of GitHub in a machine, as its runner does."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

    from tests.release.machine import Machine

REPOSITORY = Path(__file__).resolve().parents[2]
ACTION = REPOSITORY / "ci/github/action.yml"
INPUT = re.compile(r"\$\{\{ inputs\.(\w+) \}\}")


def action() -> dict[str, Any]:
    """Return the action's document."""
    document: dict[str, Any] = yaml.safe_load(ACTION.read_text("utf-8"))
    return document


def run_action(
    machine: Machine, checkout: PurePosixPath, inputs: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run every step that has a shell, each after the other, until one fails; return that last.

    Args:
        machine: where.
        checkout: the folder in the machine that holds the action's repository.
        inputs: of the action; the others have their defaults.
    """
    document = action()
    values = {name: str(each.get("default", "")) for name, each in document["inputs"].items()}
    values |= inputs
    files = {
        name: machine.home / name.lower()
        for name in ("GITHUB_PATH", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
    }
    for path in files.values():
        path.touch()
        path.chmod(0o666)
    variables = {name: f"/home/ci/{path.name}" for name, path in files.items()}
    variables |= {
        "GITHUB_ACTIONS": "true",
        "GITHUB_ACTION_PATH": str(checkout / "ci/github"),
        "RUNNER_TEMP": "/tmp",  # noqa: S108 -- the machine's own
    }
    steps = [step for step in document["runs"]["steps"] if "run" in step]
    for step in steps:
        given = {
            name: INPUT.sub(lambda m: values[m[1]], text)
            for name, text in step.get("env", {}).items()
        }
        script = f"set -eo pipefail\nPATH={added_path(machine)}:$PATH\n{step['run']}"
        done = machine.run(script, check=False, variables={**variables, **given})
        if done.returncode:
            break
    return done


def added_path(machine: Machine) -> str:
    """Return the folders that the action's steps have put before the others."""
    return ":".join(reversed((machine.home / "github_path").read_text().split()))


def gitlab_job() -> dict[str, Any]:
    """Return GitLab's template of a job."""
    document = yaml.safe_load((REPOSITORY / "ci/gitlab.yml").read_text("utf-8"))
    template: dict[str, Any] = document[".vmprovision-bake"]
    return template
