"""Restore the appliance many times, and check each time that it has the right disk.

``nox -s soak -- 1000 --jobs 3``: every image has its own mark and size. The mark is read
through the appliance and written back changed; afterwards the file must hold the change
and nothing else. No two appliances may have the same machine-id or random bytes.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from vmprovision.appliance.drives import Drive
from vmprovision.appliance.session import open_appliance
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK = 64
ASK = "cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'"


def restore_once(image: Path, number: int) -> tuple[float, bool, list[str]]:
    """Return the seconds, whether it was restored and not booted, and what must not repeat."""
    mark, answer = secrets.token_bytes(MARK), secrets.token_bytes(MARK)
    size = (1 << 20) + (number % 64) * 4096
    image.write_bytes(mark.ljust(size, b"\0"))
    begun = time.monotonic()
    with open_appliance([Drive(path=image, format="raw")], control=Control()) as appliance:
        took = time.monotonic() - begun
        assert appliance.call("pread_device", "/dev/sda", MARK, 0) == mark, "the wrong disk"
        assert appliance.call("pwrite_device", "/dev/sda", answer, MARK) == MARK
        new = appliance.call("debug", "sh", [ASK]).split()
        restored = not appliance.has_volumes
    assert image.read_bytes() == (mark + answer).ljust(size, b"\0"), "the wrong disk was written"
    image.unlink()
    return took, restored, new


def main(arguments: Sequence[str]) -> int:
    """Restore many times; return 1 if one was not restored or anything repeats."""
    parser = argparse.ArgumentParser(prog="nox -s soak --", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as threads:
        results = list(
            threads.map(lambda n: restore_once(Path(folder) / f"{n}.raw", n), range(asked.count))
        )
    new = [word for _, _, words in results for word in words]
    booted = sum(not restored for _, restored, _ in results)
    repeated = len(new) - len(set(new))
    sys.stdout.write(
        f"{asked.count} appliances, {asked.jobs} at a time, ready after "
        f"{median(took for took, _, _ in results):.2f} s (median), "
        f"{max(took for took, _, _ in results):.2f} s at most; "
        f"{booted} booted in place of restored, {repeated} repeated identities\n"
    )
    return 1 if booted or repeated else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
