"""Preprocess C sources one at a time: ``preprocess.py COMPILER... SOURCE...``.

Given several sources, zig looks for the headers of all but the first on the host.
"""

from __future__ import annotations

import subprocess
import sys


def main(words: list[str]) -> int:
    """Print the preprocessed sources; return the first exit status that is not 0."""
    sources = [word for word in words if word.endswith(".c")]
    command = [word for word in words if word not in sources]
    for source in sources:
        done = subprocess.run([*command, source], check=False)  # noqa: S603 -- make's own words
        if done.returncode:
            return done.returncode
    if not sources:  # "-": make pipes it in
        return subprocess.run([*command[:-1], "-x", "c", "-"], check=False).returncode  # noqa: S603
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
