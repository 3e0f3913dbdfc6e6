"""Recognise the guest's distribution by its release files.

os-release(5) is tried first, because only it is complete. Then come ``lsb-release`` and
the files that distributions had before. The order matters, because a derivative keeps
its parent's file beside its own.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import printable
from vmprovision.filesystem.protocol import read_text
from vmprovision.guest.facts import Distribution
from vmprovision.guest.shelltext import parse_assignments

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision.filesystem.protocol import GuestReader

RELEASE_LIMIT = 64 << 10
NAME_LIMIT = 200
_IDENTIFIER = re.compile(r"[a-z0-9._-]{1,64}")
UNKNOWN = Distribution(id="unknown", product_name="unknown Linux", version="")


def inspect_distribution(reader: GuestReader) -> Distribution:
    """Return the distribution that the first usable release file names, else ``unknown``."""
    for path, parse in _RELEASE_FILES:
        text = read_text(reader, PurePosixPath(path), RELEASE_LIMIT)
        if text and (found := parse(text)):
            return _refined(reader, found)
    return UNKNOWN


def _refined(reader: GuestReader, found: Distribution) -> Distribution:
    """Add Debian's point release, which its os-release omits, if it is known."""
    if found.id == "debian" and not found.version:
        text = (read_text(reader, PurePosixPath("/etc/debian_version"), 100) or "").strip()
        return Distribution(id=found.id, product_name=found.product_name, version=printable(text))
    return found


def parse_os_release(text: str) -> Distribution | None:
    """Return the distribution in os-release(5), or None if it has neither ID nor NAME.

    An ID with characters that os-release(5) does not allow becomes ``unknown``.
    """
    values = dict(parse_assignments(text))
    name = values.get("NAME", "")
    identifier = values.get("ID", "") or re.sub(r"[^a-z0-9._-]+", "", name.lower())
    if not identifier:
        return None
    return _described(
        identifier,
        product_name=values.get("PRETTY_NAME") or name or identifier,
        version=values.get("VERSION_ID", ""),
    )


def _described(identifier: str, *, product_name: str, version: str) -> Distribution:
    """Return a distribution from text of the guest, which may be anything."""
    identifier = identifier.lower()
    return Distribution(
        id=identifier if _IDENTIFIER.fullmatch(identifier) else UNKNOWN.id,
        product_name=printable(product_name[:NAME_LIMIT]),
        version=printable(version[:NAME_LIMIT]),
    )


def _parse_lsb_release(text: str) -> Distribution | None:
    values = dict(parse_assignments(text))
    name = values.get("DISTRIB_ID", "")
    if not name:
        return None
    return _described(
        name.replace(" ", ""),
        product_name=values.get("DISTRIB_DESCRIPTION") or name,
        version=values.get("DISTRIB_RELEASE", ""),
    )


def _parse_redhat_release(text: str) -> Distribution | None:
    line = _first_line(text)
    match = re.search(r"release\s+([\d.]+)", line)
    for words, identifier in _RED_HAT_FAMILY:
        if line.startswith(words):
            return Distribution(id=identifier, product_name=line, version=match[1] if match else "")
    return None


# beginning of `/etc/redhat-release` -> ID in the distribution's later os-release
_RED_HAT_FAMILY = (
    ("CentOS", "centos"),
    ("Fedora", "fedora"),
    ("Red Hat Enterprise Linux", "rhel"),
    ("Red Hat Linux", "redhat"),
    ("Scientific Linux", "scientific"),
    ("Oracle Linux", "ol"),
    ("Enterprise Linux Enterprise Linux", "ol"),
    ("Rocky Linux", "rocky"),
    ("AlmaLinux", "almalinux"),
    ("CloudLinux", "cloudlinux"),
    ("Amazon Linux", "amzn"),
    ("XenServer", "xenserver"),
)


def _named(identifier: str, name: str) -> Callable[[str], Distribution | None]:
    """Return a parser for release files that hold only a version or a sentence."""

    def parse(text: str) -> Distribution | None:
        line = _first_line(text)
        match = re.search(r"\d[\w.]*", line)
        product = line if re.search(r"[A-Za-z]{3}", line) else f"{name} {line}".strip()
        return Distribution(id=identifier, product_name=product, version=match[0] if match else "")

    return parse


def _parse_debian_version(text: str) -> Distribution | None:
    line = _first_line(text)
    version = line if re.match(r"[\d.]+$", line) else ""
    return Distribution(id="debian", product_name=f"Debian {line}".strip(), version=version)


def _parse_suse_release(text: str) -> Distribution | None:
    line = _first_line(text)
    pairs = (each.partition("=") for each in text.splitlines())
    values = {name.strip(): value.strip() for name, equals, value in pairs if equals}
    version, patch = values.get("VERSION", ""), values.get("PATCHLEVEL", "")
    enterprise = "Enterprise" in line
    if enterprise and patch not in ("", "0"):
        version = f"{version}.{patch}"
    return Distribution(
        id="sles" if enterprise else "opensuse",
        product_name=line,
        version=printable(version[:NAME_LIMIT]),
    )


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return printable(lines[0].strip()[:NAME_LIMIT]) if lines else ""


_RELEASE_FILES: tuple[tuple[str, Callable[[str], Distribution | None]], ...] = (
    ("/etc/os-release", parse_os_release),
    ("/usr/lib/os-release", parse_os_release),
    # before lsb-release: Red Hat's has no DISTRIB_ID and its derivatives copy it unchanged
    ("/etc/oracle-release", _parse_redhat_release),
    ("/etc/centos-release", _parse_redhat_release),
    ("/etc/fedora-release", _parse_redhat_release),
    ("/etc/redhat-release", _parse_redhat_release),
    ("/etc/system-release", _parse_redhat_release),
    ("/etc/SuSE-release", _parse_suse_release),
    ("/etc/arch-release", _named("arch", "Arch Linux")),
    ("/etc/gentoo-release", _named("gentoo", "Gentoo")),
    ("/etc/alpine-release", _named("alpine", "Alpine Linux")),
    ("/etc/slackware-version", _named("slackware", "Slackware")),
    ("/etc/openwrt_version", _named("openwrt", "OpenWrt")),
    ("/etc/devuan_version", _named("devuan", "Devuan")),
    # Ubuntu has its own lsb-release, beside the version of the Debian it came from
    ("/etc/lsb-release", _parse_lsb_release),
    ("/etc/debian_version", _parse_debian_version),
)
