"""Build the Debian package in a fresh Debian 13, as a plain user, and look at it with lintian.

``python -m tests.release.deb SDIST FOLDER`` puts the package into the folder.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tests.release.machine import make_machine

if TYPE_CHECKING:
    from tests.release.machine import Machine

SUITE = "trixie"
PACKAGE = "vmprovision"
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
        AssertionError: it cannot be built, lintian has an error or a warning, or a file of
            the source is not in it.
    """
    with tempfile.TemporaryDirectory() as place:
        machine = make_machine(SUITE, Path(place, "machine"))
        shutil.copy(sdist, machine.home)
        machine.run(PREPARE, user="root")
        machine.run(BUILD)
        (package,) = machine.home.glob("*.deb")
        lacking = source_files(sdist) - packed_files(machine, package.name)
        assert not lacking, f"the package lacks {sorted(lacking)}"
        shutil.copy(package, folder)


def source_files(sdist: Path) -> set[str]:
    """Return the files of the package, its templates and its recipes, as they are installed."""
    names = set()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            place = PurePosixPath(member.name).relative_to(PurePosixPath(member.name).parts[0])
            if member.isfile() and place.parts[0] in ("templates", "images"):
                names.add(f"{PACKAGE}/{place}")
            elif member.isfile() and place.parts[0] == PACKAGE:
                names.add(str(place))
    return names


def packed_files(machine: Machine, package: str) -> set[str]:
    """Return the files of the package vmprovision that a Debian package installs."""
    listed = machine.run(f"dpkg-deb --fsys-tarfile {package} | tar -t").stdout.splitlines()
    root = f"./usr/lib/python3/dist-packages/{PACKAGE}/"
    return {f"{PACKAGE}/{name.removeprefix(root)}" for name in listed if name.startswith(root)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
