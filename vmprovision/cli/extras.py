"""Import what an extra of the package brings, or name everything that it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from typing import TYPE_CHECKING

from vmprovision.errors import PlanError

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = "vmprovision"
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(\[\w+\])?(?P<versions>[^;]*)(?P<condition>.*)")


def import_extra(module: str, extra: str) -> ModuleType:
    """Return a module of this package that needs the packages of an extra.

    Raises:
        PlanError: one of them is missing or too old.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        if (exc.name or PACKAGE).partition(".")[0] == PACKAGE:
            raise
        missing = _missing(extra)
        what = f"packages {', '.join(missing)}" if missing else f"package {exc.name}"
        raise PlanError(
            f"the extra {extra} is not complete: it lacks the Python {what}", hint=_command(extra)
        ) from exc


def _missing(extra: str) -> list[str]:
    """Return an extra's requirements, but for those of which any version is installed."""
    missing = []
    try:
        required = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return []
    for text in required:
        found = REQUIREMENT.fullmatch(text)
        if found and re.search(rf"extra == ['\"]{extra}['\"]", found["condition"]):
            try:
                importlib.metadata.version(found[1])
            except importlib.metadata.PackageNotFoundError:
                missing.append(f"{found[1]}{found['versions']}".strip())
    return missing


def _command(extra: str) -> str:
    """Return the command that installs an extra; the system's own Python takes no packages."""
    install = f"-m pip install '{PACKAGE}[{extra}]'"
    if sys.prefix != sys.base_prefix:
        return f"{sys.executable} {install}"
    return (
        "/usr/bin/python3 -m venv --system-site-packages venv && "
        f"venv/bin/python {install}; then venv/bin/python -m {PACKAGE}"
    )
