"""Build the Debian package in a fresh Debian 13, as a plain user, and look at it with lintian.

``python -m tests.release.deb SDIST FOLDER`` puts the package into the folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.release.machine import make_machine

SUITE = "trixie"
TOOLS = "build-essential fakeroot lintian"
PREPARE = f"""
set -e
cd /home/ci
mkdir source
tar -xf vmprovision-*.tar.gz -C source --strip-components=1
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet --quiet
apt-get install --quiet --quiet --yes --no-install-recommends {TOOLS}
apt-get build-dep --quiet --quiet --yes --no-install-recommends ./source
chown -R ci:ci .
"""
BUILD = """
set -e
(cd source && dpkg-buildpackage --build=binary --unsigned-changes)
lintian --fail-on error,warning --info *.changes
"""


def main(sdist: Path, folder: Path) -> None:
    """Build the package of an sdist, and copy it into a folder.

    Raises:
        AssertionError: it cannot be built, or lintian has an error or a warning.
    """
    with tempfile.TemporaryDirectory() as place:
        machine = make_machine(SUITE, Path(place, "machine"))
        shutil.copy(sdist, machine.home)
        machine.run(PREPARE, user="root")
        machine.run(BUILD)
        for package in machine.home.glob("*.deb"):
            shutil.copy(package, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
