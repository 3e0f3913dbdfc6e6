"""Inject into an image while the host's disk fills; run inside a mount namespace of its own.

``full.py FOLDER IMAGE`` gives the folder a small filesystem, copies the image there and
fills the rest as soon as the guest has been inspected.  It prints how it ended.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import vmprovision
from vmprovision.progress import Control, Progress

ROOM = 66 << 20  # a little more than an injection requires


def main(folder: Path, original: Path) -> None:
    """Fill the disk during an injection."""
    size = (original.stat().st_blocks * 512 + ROOM + (1 << 20)) >> 10
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
    image = folder / original.name
    subprocess.run(["cp", "--sparse=always", original, image], check=True)
    before = digest(image)

    def fill(progress: Progress) -> None:
        if progress.step == "inspecting the guest":
            with (folder / "filler").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                except OSError:
                    pass

    try:
        vmprovision.inject(image, vmprovision.InjectOptions(), control=Control(report=fill))
        outcome: dict[str, Any] = {"kind": "none", "message": ""}
    except vmprovision.VmprovisionError as exc:
        outcome = exc.as_json()
    outcome["untouched"] = digest(image) == before
    outcome["left"] = sorted(path.name for path in folder.iterdir())
    sys.stdout.write(json.dumps(outcome))


def digest(path: Path) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
