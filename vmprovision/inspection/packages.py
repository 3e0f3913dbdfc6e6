"""List a guest's packages by its own database: dpkg's, apk's or rpm's.

The databases are read as files; no package manager of the guest or the host runs.
Formats: dpkg's ``status`` by deb-control(5) and dpkg(1), and ``status.d`` of images
without dpkg; apk's ``installed`` by apk-tools' ``apk-v2`` format; rpm's SQLite database
in ``rpmdb.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.errors import InspectionError, printable
from vmprovision.filesystem.protocol import read_all, resolved_file, status_of
from vmprovision.inspection.rpmdb import read_rpm_database

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmprovision.filesystem.protocol import GuestReader

PackageFormat = Literal["deb", "apk", "rpm"]
DATABASE_LIMIT = 64 << 20  # bytes; a full desktop's dpkg has 8 MiB
PACKAGE_LIMIT = 50_000
FIELD_LIMIT = 500  # characters
DPKG = PurePosixPath("/var/lib/dpkg/status")
DPKG_PARTS = PurePosixPath("/var/lib/dpkg/status.d")
APK = (PurePosixPath("/lib/apk/db/installed"), PurePosixPath("/usr/lib/apk/db/installed"))
RPM = (
    PurePosixPath("/usr/lib/sysimage/rpm/rpmdb.sqlite"),
    PurePosixPath("/var/lib/rpm/rpmdb.sqlite"),
)
# These hold the same in unsupported formats.
OTHER_RPM = (
    PurePosixPath("/usr/lib/sysimage/rpm/Packages.db"),
    PurePosixPath("/usr/lib/sysimage/rpm/Packages"),
    PurePosixPath("/var/lib/rpm/Packages.db"),
    PurePosixPath("/var/lib/rpm/Packages"),
)
_DPKG_FIELD = re.compile(r"([A-Za-z][A-Za-z0-9-]*):[ \t]*(.*)")
_APK_FIELD = re.compile(r"([A-Za-z]):(.*)")
# dpkg's states in which at least some of a package's files are installed
_PRESENT = ("installed", "unpacked", "half-configured", "half-installed")
_PRESENT_TOO = ("triggers-awaited", "triggers-pending")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Package:
    """One package of the guest.

    Attributes:
        format: ``deb``, ``apk`` or ``rpm``.
        name: the package's name.
        version: the version in the package's own format; for rpm without the epoch.
        architecture: the package's architecture.
        epoch: an rpm package's epoch; empty if it has none.
        source: the source package, if the database names it.
        licence: the licence in the database; dpkg's has none.
    """

    format: PackageFormat
    name: str
    version: str
    architecture: str
    epoch: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageList:
    """The content of the guest's package databases.

    Attributes:
        packages: sorted.
        databases: the guest paths of the databases that were read.
        gaps: sentences about what could not be read.
    """

    packages: tuple[Package, ...]
    databases: tuple[PurePosixPath, ...]
    gaps: tuple[str, ...] = ()


def list_packages(reader: GuestReader) -> PackageList:
    """Return the guest's packages.

    A database that is damaged or too large is a gap, not an error: all other packages
    are still listed.

    Raises:
        InspectionError: the guest's filesystem cannot be read.
    """
    found: list[Package] = []
    databases: list[PurePosixPath] = []
    gaps: list[str] = []
    for path, kind in _databases(reader):
        try:
            content = read_all(reader, path, DATABASE_LIMIT)
            packages = list(_PARSERS[kind](content))
        except (InspectionError, ValueError) as exc:
            reason = exc.message if isinstance(exc, InspectionError) else str(exc)
            gaps.append(printable(f"the package database {path} was not read: {reason}"))
            continue
        databases.append(path)
        found += packages
        if len(found) > PACKAGE_LIMIT:
            gaps.append(f"more than {PACKAGE_LIMIT} packages: only the first ones are listed")
            break
    gaps += _unread(reader, databases)
    return PackageList(
        packages=tuple(sorted(set(found[:PACKAGE_LIMIT]))),
        databases=tuple(databases),
        gaps=tuple(gaps),
    )


def _databases(reader: GuestReader) -> Iterator[tuple[PurePosixPath, PackageFormat]]:
    """Return the databases that can be read, each by its real path, once."""
    parts = []
    if (status := status_of(reader, DPKG_PARTS)) and status.kind == "directory":
        names = reader.list_directory(DPKG_PARTS)
        parts = [DPKG_PARTS / name for name in names if not name.endswith(".md5sums")]
    candidates: list[tuple[PurePosixPath, PackageFormat]] = [
        *((path, "deb") for path in (DPKG, *parts)),
        *((path, "apk") for path in APK),
        *((path, "rpm") for path in RPM),
    ]
    seen = set()
    for path, kind in candidates:
        real = resolved_file(reader, path)
        if real is not None and real not in seen:
            seen.add(real)
            yield real, kind


def _unread(reader: GuestReader, databases: list[PurePosixPath]) -> Iterator[str]:
    if any(path.name == "rpmdb.sqlite" for path in databases):
        for path in databases:
            log = path.with_name(path.name + "-wal")
            status = status_of(reader, log) if path.name == "rpmdb.sqlite" else None
            if status and status.size:
                yield f"{log} holds changes of the rpm database that were not read"
        return
    for path in OTHER_RPM:
        if resolved_file(reader, path) is not None:
            yield f"the rpm database {path} has a format that is not read (only SQLite is)"
            return


def _parse_dpkg(content: bytes) -> Iterator[Package]:
    """Parse dpkg's status file; skip packages of which only configuration is left."""
    for fields in _paragraphs(content, _DPKG_FIELD):
        state = fields.get("Status", "install ok installed").split()[-1:]
        if not state or state[0] not in (*_PRESENT, *_PRESENT_TOO):
            continue
        name, version = fields.get("Package", ""), fields.get("Version", "")
        if name and version:
            yield Package(
                format="deb",
                name=name,
                version=version,
                architecture=fields.get("Architecture", ""),
                source=(fields.get("Source", "").split() or [name])[0],
            )


def _parse_apk(content: bytes) -> Iterator[Package]:
    """Parse apk's list; a package's fields come before its first directory."""
    for fields in _paragraphs(content, _APK_FIELD):
        name, version = fields.get("P", ""), fields.get("V", "")
        if name and version:
            yield Package(
                format="apk",
                name=name,
                version=version,
                architecture=fields.get("A", ""),
                source=fields.get("O", ""),
                licence=fields.get("L", ""),
            )


def _paragraphs(content: bytes, line_form: re.Pattern[str]) -> Iterator[Mapping[str, str]]:
    """Yield the fields of each paragraph by name, the first of each name."""
    for paragraph in re.split(rb"\n[ \t]*\n", content):
        fields: dict[str, str] = {}
        for line in paragraph.decode("utf-8", "replace").split("\n"):
            if match := line_form.match(line):
                fields.setdefault(match[1], printable(match[2].strip())[:FIELD_LIMIT])
        if fields:
            yield fields


def _parse_rpm(content: bytes) -> Iterator[Package]:
    for header in read_rpm_database(content, PACKAGE_LIMIT):
        yield Package(
            format="rpm",
            name=printable(header.name)[:FIELD_LIMIT],
            version=printable(header.version)[:FIELD_LIMIT],
            architecture=printable(header.architecture)[:FIELD_LIMIT],
            epoch=header.epoch,
            source=printable(header.source)[:FIELD_LIMIT],
            licence=printable(header.licence)[:FIELD_LIMIT],
        )


_PARSERS = {"deb": _parse_dpkg, "apk": _parse_apk, "rpm": _parse_rpm}
