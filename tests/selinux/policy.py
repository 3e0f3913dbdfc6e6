"""A real policy: Debian's, as its package makes it on a machine; kept in the cache."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path

from vmprovision.host.cache import cache_directory
from vmprovision.recipe import parse_recipe
from vmprovision.recipe.packages import make_guest_files

RECIPE = """\
description = "Debian with its SELinux policy, which nobody boots"
architecture = "amd64"
suite = "bookworm"
variant = "minbase"
packages = ["selinux-policy-default"]

[disk]
size_mb = 1024
partition_table = "none"
filesystem = "ext4"
features = []
uuid = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a13ff"
bootloader = "none"
command_line = "quiet"
"""
FOLDER = "etc/selinux"
RULES = "default/contexts/files"
NAMES = ("file_contexts", "file_contexts.homedirs", "file_contexts.subs_dist")


def debian_policy() -> dict[str, bytes]:
    """Return the policy's configuration and rules by guest path."""
    key = hashlib.sha256(RECIPE.encode()).hexdigest()[:16]
    folder = cache_directory() / "tests" / f"selinux-policy-{key}"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as workplace:
                _fetch(Path(workplace)).rename(folder)
    names = ["config", *(f"{RULES}/{name}" for name in NAMES)]
    return {f"/{FOLDER}/{name}": (folder / name).read_bytes() for name in names}


def _fetch(workplace: Path) -> Path:
    """Fetch the policy; return the folder with its files."""
    recipe = workplace / "selinux-policy"
    recipe.mkdir()
    (recipe / "recipe.toml").write_text(RECIPE)
    archive = workplace / "guest.tar"
    make_guest_files(parse_recipe(recipe), archive)
    found = workplace / "policy"
    with tarfile.open(archive) as opened:
        for name in ("config", *(f"{RULES}/{name}" for name in NAMES)):
            file = opened.extractfile(f"./{FOLDER}/{name}")
            assert file is not None
            (found / name).parent.mkdir(parents=True, exist_ok=True)
            with (found / name).open("wb") as target:
                shutil.copyfileobj(file, target)
    return found
