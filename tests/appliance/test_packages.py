"""Which packages are inside the appliance, so that only these make a saved one stale."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.conftest import require
from vmprovision.appliance.session import open_appliance
from vmprovision.appliance.snapshot.host import host_appliance
from vmprovision.appliance.snapshot.ingredients import supermin_inputs
from vmprovision.appliance.snapshot.packages import DPKG, versions_inside
from vmprovision.progress import Control

STATUS = """\
Package: wanted
Status: install ok installed
Architecture: amd64
Version: 1
Depends: libdirect (>= 1:2), old | new:any, virtual
Pre-Depends: libpre
Description: what is wanted
 Depends: a line of a description is no field

Package: libdirect
Status: install ok installed
Architecture: amd64
Version: 2-1
Depends: wanted

Package: libpre
Status: install ok installed
Architecture: all
Version: 3

Package: old
Status: deinstall ok config-files
Architecture: amd64
Version: 4
Depends: stranger

Package: new
Status: install ok installed
Architecture: amd64
Version: 5

Package: provider
Status: install ok installed
Architecture: amd64
Version: 6
Provides: virtual (= 1), other

Package: stranger
Status: install ok installed
Architecture: amd64
Version: 7
Recommends: wanted
"""
INSIDE = {
    "wanted:amd64": "1",
    "libdirect:amd64": "2-1",
    "libpre:all": "3",
    "new:amd64": "5",
    "provider:amd64": "6",
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Supermin's inputs, in two lists as some distributions have them."""
    folder = tmp_path / "supermin.d"
    folder.mkdir()
    (folder / "packages").write_text("wanted\nnot-installed\n")
    (folder / "packages-more").write_text("libpre\n")
    return folder


def test_the_packages_inside_are_the_listed_ones_and_their_dependencies(
    inputs: Path, tmp_path: Path
) -> None:
    """Alternatives and providers count if they are installed; others do not."""
    status = tmp_path / "status"
    status.write_text(STATUS)
    assert versions_inside(inputs, status) == INSIDE
    status.write_text(STATUS.replace("Version: 7", "Version: 8"))
    assert versions_inside(inputs, status) == INSIDE
    status.write_text(STATUS.replace("Version: 6", "Version: 6.1"))
    assert versions_inside(inputs, status) == {**INSIDE, "provider:amd64": "6.1"}
    assert versions_inside(inputs, tmp_path / "missing") is None


@pytest.mark.appliance
def test_every_file_in_the_appliance_is_of_a_package_that_counts() -> None:
    """Supermin itself decides what it copies; nothing of that may be missing here."""
    require(DPKG.exists(), "this host has no dpkg")
    require(host_appliance(Control()), "no appliance can be saved here")
    inputs = supermin_inputs()
    known: set[str] = set()
    for archive in inputs.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            known |= {f"/{entry.name.removeprefix('./')}" for entry in tar}
    versions = versions_inside(inputs)
    assert versions
    for key in versions:
        name = key.partition(":")[0]
        for path in (f"/var/lib/dpkg/info/{name}.list", f"/var/lib/dpkg/info/{key}.list"):
            if Path(path).exists():
                known |= set(Path(path).read_text().splitlines())
    bare = {path.removeprefix("/usr") for path in known}  # /bin is /usr/bin, or was
    with open_appliance([], control=Control()) as appliance:
        found = appliance.call("debug", "sh", ["find /usr/bin /usr/sbin /usr/lib -type f"])
    files = [line for line in found.splitlines() if not line.startswith("/usr/lib/modules/")]
    assert len(files) > 1000
    ours = "/usr/lib/vmprovision/"
    strange = {line for line in files if line.removeprefix("/usr") not in bare}
    assert {line for line in strange if not line.startswith(ours)} == set()
