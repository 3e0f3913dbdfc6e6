"""Find the Debian mirrors that this host itself uses (sources.list(5))."""

from __future__ import annotations

import re

from vmprovision.errors import CommandError
from vmprovision.host.command import run

APT_SECONDS = 60.0
INDEX_FIELDS = r"$(REPO_URI)\t$(ORIGIN)\t$(CODENAME)\t$(COMPONENT)\t$(SIGNED_BY)"
UNSTABLE = ("sid", "unstable")


def host_mirrors(suite: str, *, updates: bool) -> list[str]:
    """Return lines of ``sources.list(5)`` for a suite on this host's own Debian mirrors.

    The list is empty if the host uses none.
    """
    try:
        printed = run(
            ["apt-get", "indextargets", "--format", INDEX_FIELDS, "Created-By: Packages"],
            timeout=APT_SECONDS,
        ).stdout
    except CommandError:
        return []  # no apt here
    return parse_index_targets(printed, suite, updates=updates)


def parse_index_targets(printed: str, suite: str, *, updates: bool = True) -> list[str]:
    """Return lines of ``sources.list(5)`` from the output of ``apt-get indextargets``.

    A Debian mirror carries all suites, so the host may have another release than the
    guest.  The security archive is elsewhere, and is used if the host uses it.  Unstable
    has no archives of updates.
    """
    lines: list[str] = []
    for line in printed.splitlines():
        fields = line.replace("\\t", "\t").split("\t")
        if len(fields) != INDEX_FIELDS.count("$"):
            continue
        uri, origin, codename, component, key = fields
        if origin != "Debian" or component != "main" or not re.match(r"https?:|mirror\+", uri):
            continue
        suffix = next((end for end in ("-security", "-updates") if codename.endswith(end)), "")
        if not suffix and "-" in codename:
            continue  # backports and the like
        if suffix and (not updates or suite in UNSTABLE):
            continue
        signed = f"[signed-by={key}] " if key.startswith("/") else ""
        lines.append(f"deb {signed}{uri} {suite}{suffix} main")
    return sorted(dict.fromkeys(lines), key=len)
