"""Debian's programs that tests talk to: unpacked, not installed, so that no service starts."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.conftest import require
from vmprovision.host.cache import cache_directory

APT_SECONDS = 300.0


def unpacked(package: str) -> Path:
    """The folder with a package's files, as the host's own mirror has it; kept in the cache.

    Skips the test if it cannot be had; with CI set, fails it.
    """
    folder = cache_directory() / "tests" / package
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as workshop:
            reason = _download(package, Path(workshop))
            require(not reason, f"{package} cannot be had from this host's mirror: {reason}")
            (archive,) = Path(workshop).glob("*.deb")
            unpacking = Path(workshop) / "unpacked"
            subprocess.run(["dpkg-deb", "--extract", archive, unpacking], check=True)
            try:
                unpacking.rename(folder)
            except OSError:  # another test was faster
                assert folder.exists()
    return folder


def _download(package: str, workshop: Path) -> str:
    """Nothing, or why apt could not; with lists of its own where the host has none."""
    for folder in ("state/lists/partial", "archives/partial"):
        (workshop / folder).mkdir(parents=True)
    private = [f"-oDir::State={workshop}/state", "-oDir::State::status=/var/lib/dpkg/status"]
    common = ["-oAPT::Sandbox::User=root", f"-oDir::Cache={workshop}"]
    steps = (
        [["apt-get", *common, "download", package]],
        [
            ["apt-get", *common, *private, "update"],
            ["apt-get", *common, *private, "download", package],
        ],
    )
    reason = ""
    for commands in steps:
        for command in commands:
            try:
                done = subprocess.run(
                    command,
                    cwd=workshop,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=APT_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as exc:
                return str(exc)
            reason = done.stderr.strip() if done.returncode else ""
        if not reason:
            return ""
    return reason
