"""A root in which the tools of init systems run: see ``root/recipe.toml``."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.host.cache import cache_directory
from vmprovision.recipe.packages import make_guest_files
from vmprovision.recipe.schema import parse_recipe
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPE = Path(__file__).with_name("root")
SECONDS = 90.0
# in a mount namespace of its own, which nothing leaves
ENTER = """\
mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" /bin/sh /root/script
"""


@dataclass(frozen=True, kw_only=True)
class ToolsRoot:
    """A root with init systems' tools; what runs in it has a process namespace of its own.

    Everything that a script starts ends with the script.
    """

    root: Path

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the root, as its root."""
        self.write("/root/script", script.encode())
        return subprocess.run(
            [*_namespace(), "/bin/sh", "-c", ENTER, self.root],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=SECONDS,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        )

    def write(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file in the root."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it may be a second name of the kept root's file
        target.write_bytes(content)
        target.chmod(mode)


def _namespace() -> list[str]:
    # a user has as many users in its namespace as /etc/subuid gives
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user", "--map-auto"]
    return ["unshare", *users, "--mount", "--pid", "--fork", "--kill-child"]


@pytest.fixture(scope="session")
def _tools() -> Path:
    """Return the unpacked root, kept in the cache; nobody may write to it."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    require(platform.machine() == "x86_64", "the tools are those for x86-64")
    tried = subprocess.run(
        [*_namespace(), "true"], capture_output=True, check=False, timeout=SECONDS
    )
    require(tried.returncode == 0, f"no namespaces here: {tried.stderr.decode()}")
    recipe = parse_recipe(RECIPE)
    kept = cache_directory() / "tests" / f"tools-{recipe.key()}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:  # each worker of pytest asks
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            archive, unpacked = kept.with_suffix(".tar"), kept.with_suffix(".new")
            shutil.rmtree(unpacked, ignore_errors=True)
            make_guest_files(recipe, archive)
            unpacked.mkdir()
            subprocess.run(
                ["tar", "--extract", "--exclude=./dev/*", "--file", archive],
                cwd=unpacked,
                check=True,
                timeout=SECONDS,
            )
            archive.unlink()
            for mountpoint in ("dev", "proc"):
                (unpacked / mountpoint).mkdir(exist_ok=True)
            (unpacked / "var/run").symlink_to("/run")  # as base-files has it
            unpacked.rename(kept)
    return kept


@pytest.fixture
def tools(_tools: Path) -> Iterator[ToolsRoot]:
    """Return hard links to the kept root's files, with the agent in it, for one test."""
    with tempfile.TemporaryDirectory(prefix="tools-", dir=_tools.parent) as folder:
        root = Path(folder) / "root"
        subprocess.run(["cp", "--archive", "--link", _tools, root], check=True, timeout=SECONDS)
        made = ToolsRoot(root=root)
        made.write("/usr/local/bin/guest-agent", build_archive().content, 0o755)
        yield made
