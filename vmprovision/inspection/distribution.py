"""Which distribution the guest is, by its release files.

os-release(5) first, as it is the one file that says all there is to say; then
``lsb-release`` and the files that distributions had before it.  The order
matters: a derivative keeps its parent's file beside its own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import printable
from vmprovision.filesystem import read_text
from vmprovision.guest import Distribution

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision.filesystem import GuestReader

RELEASE_LIMIT = 64 << 10
UNKNOWN = Distribution(id="unknown", product_name="unknown Linux", version="")


def inspect_distribution(reader: GuestReader) -> Distribution:
    """The distribution by the first release file that names one; ``unknown`` without any."""
    for path, parse in _RELEASE_FILES:
        text = read_text(reader, PurePosixPath(path), RELEASE_LIMIT)
        if text and (found := parse(text)):
            return _refined(reader, found)
    return UNKNOWN


def _refined(reader: GuestReader, found: Distribution) -> Distribution:
    """Add the point release that Debian's os-release leaves out, where it is known."""
    if found.id == "debian" and not found.version:
        text = (read_text(reader, PurePosixPath("/etc/debian_version"), 100) or "").strip()
        return Distribution(id=found.id, product_name=found.product_name, version=printable(text))
    return found


def parse_os_release(text: str) -> Distribution | None:
    """os-release(5): shell-compatible assignments; None where there is neither ID nor NAME."""
    values = parse_assignments(text)
    name = values.get("NAME", "")
    identifier = values.get("ID", "") or re.sub(r"[^a-z0-9._-]+", "", name.lower())
    if not identifier:
        return None
    return Distribution(
        id=identifier.lower(),
        product_name=values.get("PRETTY_NAME") or name or identifier,
        version=values.get("VERSION_ID", ""),
    )


def parse_assignments(text: str) -> dict[str, str]:
    """``KEY=value`` lines, the value quoted as in a shell or not at all; no escape sequences."""
    values = {}
    for line in text.splitlines():
        key, equals, raw = line.strip().partition("=")
        if not equals or key.startswith("#") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            continue
        try:
            words = shlex.split(raw, comments=False)
        except ValueError:  # an unclosed quote
            words = [raw.strip("\"'")]
        values[key] = printable(" ".join(words))
    return values


def _parse_lsb_release(text: str) -> Distribution | None:
    values = parse_assignments(text)
    name = values.get("DISTRIB_ID", "")
    if not name:
        return None
    return Distribution(
        id=name.lower().replace(" ", ""),
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


# as `/etc/redhat-release` begins -> ID as the same distribution's os-release has it later
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
    """A parser for files that hold a version or a sentence and nothing else."""

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
    values = dict(re.findall(r"^(\w+)\s*=\s*(\S+)", text, re.MULTILINE))
    version, patch = values.get("VERSION", ""), values.get("PATCHLEVEL", "")
    enterprise = "Enterprise" in line
    if enterprise and patch not in ("", "0"):
        version = f"{version}.{patch}"
    return Distribution(
        id="sles" if enterprise else "opensuse",
        product_name=line,
        version=printable(version),
    )


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return printable(lines[0].strip())[:200] if lines else ""


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
    # Ubuntu's own is lsb-release, beside Debian's version of the release it came from
    ("/etc/lsb-release", _parse_lsb_release),
    ("/etc/debian_version", _parse_debian_version),
)
