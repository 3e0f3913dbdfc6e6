"""Debian's programs for tests: unpacked and not installed, so that no service starts."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.conftest import require
from vmprovision.host.cache import cache_directory

APT_SECONDS = 300.0


def unpacked(package: str) -> Path:
    """Return the folder with a package's files, from the host's own mirror; kept in the cache.

    Skips the test if the package cannot be fetched; fails it if ``CI`` is set.
    """
    kept = cache_directory() / "tests" / package
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            reason = _download(package, Path(folder))
            require(not reason, f"{package} cannot be fetched from this host's mirror: {reason}")
            (archive,) = Path(folder).glob("*.deb")
            unpacking = Path(folder) / "unpacked"
            subprocess.run(["dpkg-deb", "--extract", archive, unpacking], check=True)
            try:
                unpacking.rename(kept)
            except OSError:  # another test was faster
                assert kept.exists()
    return kept


def _download(package: str, folder: Path) -> str:
    """Return nothing, or why apt failed; apt gets package lists of its own if the host has none."""
    for name in ("state/lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    private = [f"-oDir::State={folder}/state", "-oDir::State::status=/var/lib/dpkg/status"]
    common = ["-oAPT::Sandbox::User=root", f"-oDir::Cache={folder}"]
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
                    cwd=folder,
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
