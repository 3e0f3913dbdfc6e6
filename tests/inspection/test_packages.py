"""Package databases, as the distributions' own programs wrote them, and hostile ones."""

from __future__ import annotations

import random
import shutil
import subprocess
import tarfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.trees import SYSTEMD_TREE, Link, make_tree, require_root_filesystem
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection import packages as module
from vmprovision.inspection.packages import Package, list_packages
from vmprovision.inspection.rpmdb import read_rpm_database

if TYPE_CHECKING:
    from vmprovision.inspection.packages import PackageList

STATUS = """\
Package: base-files
Status: install ok installed
Architecture: amd64
Version: 12.4+deb12u5
Description: files
 Package: not-this
 .
 Version: 9

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: libc6
Status: hold ok triggers-pending
Architecture: amd64
Source: glibc (2.36-9)
Version: 2.36-9+deb12u4

Package: half
Status: install reinstreq half-configured
Architecture: all
Version: 2:1.0~rc1-1
"""
# as apk-tools 2 writes it
INSTALLED = """\
C:Q1pIv4Sg9Vtn5XVXWTXt1C9vbZIGM=
P:musl
V:1.2.4-r2
A:x86_64
S:383459
L:MIT
o:musl
F:lib
R:ld-musl-x86_64.so.1
a:0:0:755
Z:Q12adwqQOjo9dFl+VJD2Ecd901vhE=

P:alpine-baselayout-data
V:3.4.3-r1
A:x86_64
L:GPL-2.0-only
o:alpine-baselayout
"""
SPEC = """\
Name: many
Version: 1.0
Release: 3
Epoch: {epoch}
Summary: packages
License: MIT and BSD
BuildArch: noarch
%description
none
{subpackages}
%files
%changelog
"""
SUBPACKAGE = """\
%package p{number}
Summary: {summary}
%description p{number}
none
%files p{number}
"""


def packages_of(root: Path) -> PackageList:
    """Return the packages of the guest in a directory."""
    return list_packages(LocalFilesystem(root))


def test_dpkg(tmp_path: Path) -> None:
    """Installed and half-installed packages are listed; continuation lines are not fields."""
    found = packages_of(make_tree(tmp_path, {"/var/lib/dpkg/status": STATUS}))
    assert found.packages == (
        Package(
            format="deb",
            name="base-files",
            version="12.4+deb12u5",
            architecture="amd64",
            source="base-files",
        ),
        Package(
            format="deb", name="half", version="2:1.0~rc1-1", architecture="all", source="half"
        ),
        Package(
            format="deb",
            name="libc6",
            version="2.36-9+deb12u4",
            architecture="amd64",
            source="glibc",
        ),
    )
    assert found.databases == (PurePosixPath("/var/lib/dpkg/status"),)
    assert found.gaps == ()


def test_dpkg_of_this_host(tmp_path: Path) -> None:
    """The list is the one that dpkg-query itself gives of the same database."""
    database = Path("/var/lib/dpkg/status")
    require(shutil.which("dpkg-query") and database.exists(), "this host has no dpkg")
    tree = make_tree(tmp_path, {"/var/lib/dpkg/status": database.read_bytes()})
    fields = "${Package} ${Version} ${Architecture} ${source:Package} ${db:Status-Status}\n"
    listed = subprocess.run(
        ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "--show", f"--showformat={fields}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    expected = {tuple(line.split()[:4]) for line in listed.splitlines() if "installed" in line}
    found = packages_of(tree).packages
    assert {(p.name, p.version, p.architecture, p.source) for p in found} == expected
    assert len(found) == len(expected) > 100


def test_dpkg_without_dpkg(tmp_path: Path) -> None:
    """Images without the program have a file for each package."""
    text = "Package: tzdata\nVersion: 2024a-0\nArchitecture: all\n"
    files = {"/var/lib/dpkg/status.d/tzdata": text, "/var/lib/dpkg/status.d/tzdata.md5sums": "x\n"}
    (found,) = packages_of(make_tree(tmp_path, files)).packages
    assert (found.name, found.version) == ("tzdata", "2024a-0")


@pytest.mark.parametrize("place", ["/lib/apk/db/installed", "/usr/lib/apk/db/installed"])
def test_apk(tmp_path: Path, place: str) -> None:
    """Lines about files do not change what the package is; a merged /usr is read once."""
    extra = {"/lib": Link("usr/lib")} if place.startswith("/usr") else {}
    found = packages_of(make_tree(tmp_path, {place: INSTALLED, **extra}))
    assert [(p.name, p.version, p.architecture, p.licence) for p in found.packages] == [
        ("alpine-baselayout-data", "3.4.3-r1", "x86_64", "GPL-2.0-only"),
        ("musl", "1.2.4-r2", "x86_64", "MIT"),
    ]
    assert len(found.databases) == 1


def test_apk_of_a_real_alpine(tmp_path: Path) -> None:
    """The database that apk itself has written into a release."""
    release = require_root_filesystem("alpine-minirootfs-3.20.3-x86_64.tar.gz")
    with tarfile.open(release) as tar:
        member = tar.extractfile("./lib/apk/db/installed")
        assert member is not None
        content = member.read()
    found = packages_of(make_tree(tmp_path, {"/lib/apk/db/installed": content})).packages
    assert len(found) == content.count(b"\nP:")
    versions = {package.name: package.version for package in found}
    assert versions["alpine-baselayout"] == "3.6.5-r0"
    assert all(package.version and package.architecture == "x86_64" for package in found)


@pytest.fixture(scope="module")
def rpm_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of 120 packages that rpm made; some headers need overflow pages."""
    for program in ("rpm", "rpmbuild"):
        require(shutil.which(program), f"{program} is not installed")
    folder = tmp_path_factory.mktemp("rpm")
    subpackages = "".join(
        SUBPACKAGE.format(number=number, summary="s" * (1 + number * 97)) for number in range(120)
    )
    spec = folder / "many.spec"
    spec.write_text(SPEC.format(epoch=7, subpackages=subpackages))
    own = ["--define", f"_topdir {folder}/build", "--define", "_dbpath /var/lib/rpm"]
    subprocess.run(["rpmbuild", *own, "-bb", spec], check=True, capture_output=True)
    root = folder / "root"
    root.mkdir()
    built = sorted((folder / "build" / "RPMS").rglob("*.rpm"))
    command = ["rpm", "--root", str(root), *own, "--install", "--justdb", "--nodeps"]
    subprocess.run([*command, *map(str, built)], check=True, capture_output=True)
    return root


def test_rpm(rpm_database: Path) -> None:
    """Every package that rpm lists is listed, with the same fields."""
    query = "%{NAME} %{VERSION}-%{RELEASE} %{ARCH} %{EPOCH} %{SOURCERPM}|%{LICENSE}\n"
    listed = subprocess.run(
        [
            *("rpm", "--root", rpm_database, "--define", "_dbpath /var/lib/rpm"),
            *("--query", "--all", "--queryformat", query),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = packages_of(rpm_database)
    assert sorted(listed.splitlines()) == sorted(
        f"{p.name} {p.version} {p.architecture} {p.epoch} {p.source}|{p.licence}"
        for p in found.packages
    )
    assert len(found.packages) == 121
    assert found.databases == (PurePosixPath("/var/lib/rpm/rpmdb.sqlite"),)


def test_damaged_rpm_databases_end(rpm_database: Path) -> None:
    """With any changed bytes, the reader quickly gives packages or one error."""
    content = (rpm_database / "var/lib/rpm/rpmdb.sqlite").read_bytes()
    chance = random.Random(17)
    errors = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 20, 400])):
            damaged[chance.randrange(chance.choice([200, len(damaged)]))] = chance.randrange(256)
        try:
            assert len(list(read_rpm_database(bytes(damaged), 1000))) <= 1001
        except ValueError:
            errors += 1
    assert errors > 20


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    """An rpm database of another format, a damaged one, and a log are gaps, not errors."""
    tree = make_tree(tmp_path / "a", {"/var/lib/rpm/Packages": b"\0" * 4096})
    (gap,) = packages_of(tree).gaps
    assert "/var/lib/rpm/Packages has a format that is not read" in gap
    tree = make_tree(tmp_path / "b", {"/var/lib/rpm/rpmdb.sqlite": b"nothing"})
    (gap,) = packages_of(tree).gaps
    assert "it is not an SQLite database" in gap
    assert packages_of(make_tree(tmp_path / "c", SYSTEMD_TREE)).packages == ()


def test_changes_that_are_only_in_the_log_are_a_gap(rpm_database: Path, tmp_path: Path) -> None:
    """A database whose machine was killed may have changes beside it."""
    content = (rpm_database / "var/lib/rpm/rpmdb.sqlite").read_bytes()
    tree = make_tree(
        tmp_path,
        {"/var/lib/rpm/rpmdb.sqlite": content, "/var/lib/rpm/rpmdb.sqlite-wal": b"\0" * 100},
    )
    found = packages_of(tree)
    assert len(found.packages) == 121
    assert "rpmdb.sqlite-wal holds changes" in found.gaps[0]


def test_hostile_text_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences do not reach a terminal; too many or too large is a gap."""
    text = f"Package: a\x1b[31m{'x' * 9000}\nStatus: install ok installed\nVersion: 1\n"
    tree = make_tree(tmp_path, {"/var/lib/dpkg/status": text})
    (package,) = packages_of(tree).packages
    assert "\x1b" not in package.name
    assert len(package.name) == module.FIELD_LIMIT
    monkeypatch.setattr(module, "DATABASE_LIMIT", 100)
    assert "larger than the 100 bytes" in packages_of(tree).gaps[0]
    monkeypatch.undo()
    monkeypatch.setattr(module, "PACKAGE_LIMIT", 2)
    tree = make_tree(tmp_path / "many", {"/var/lib/dpkg/status": STATUS})
    assert len(packages_of(tree).packages) == 2
    assert "only the first ones are listed" in packages_of(tree).gaps[0]
