"""The host's packages that are inside the appliance, with their versions.

supermin copies the files of libguestfs's packages and of all that these depend on. An
upgrade of any of them makes a saved appliance stale; an unrelated package does not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.appliance.snapshot.identity import identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vmprovision.appliance.snapshot.identity import Identity

DPKG = Path("/var/lib/dpkg/status")
# Where other package managers list what is installed; dependencies are not read there.
OTHERS = (
    Path("/usr/lib/sysimage/rpm/rpmdb.sqlite"),
    Path("/var/lib/rpm/rpmdb.sqlite"),
    Path("/var/lib/rpm/Packages"),
    Path("/var/lib/pacman/local"),
)
LISTED = "packages*"  # supermin's lists of names, in the folder of its inputs
INSTALLED = "install ok installed"
DEPENDENCIES = ("Depends", "Pre-Depends")
FIELDS = frozenset(("Package", "Status", "Version", "Architecture", "Provides", *DEPENDENCIES))
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*")


def package_lists() -> list[Identity]:
    """Return the identity of the host's lists of packages; any change of a package changes it.

    Raises:
        OSError: a list cannot be looked at.
    """
    lists = [DPKG] if DPKG.exists() else [path for path in OTHERS if path.exists()]
    return [identity(path) for path in lists]


def versions_inside(inputs: Path, status: Path | None = None) -> dict[str, str] | None:
    """Return the versions of all packages that supermin takes, by name and architecture.

    Of alternatives and of packages that provide the same, all that are installed count:
    a package too many costs a needless build, a package too few a stale appliance.

    Args:
        inputs: supermin's, with the names of the packages.
        status: dpkg's list, if not the host's.

    Returns:
        None if this host's package manager is not dpkg.

    Raises:
        OSError: a file cannot be read.
    """
    status = status or DPKG
    if not status.exists():
        return None
    by_name: dict[str, list[Mapping[str, str]]] = {}
    for stanza in _installed(status):
        for name in {stanza["Package"], *_names(stanza.get("Provides", ""))}:
            by_name.setdefault(name, []).append(stanza)
    todo = [name for path in inputs.glob(LISTED) for name in path.read_text("utf-8").split()]
    versions: dict[str, str] = {}
    done: set[str] = set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        for stanza in by_name.get(name, ()):
            key = f"{stanza['Package']}:{stanza.get('Architecture', '')}"
            versions[key] = stanza.get("Version", "")
            for field in DEPENDENCIES:
                todo += _names(stanza.get(field, ""))
    return versions


def _installed(status: Path) -> Iterator[Mapping[str, str]]:
    """Yield the fields of each installed package of dpkg's list."""
    for block in status.read_text("utf-8", errors="replace").split("\n\n"):
        lines = (line.partition(":") for line in block.split("\n"))
        stanza = {name: value.strip() for name, _, value in lines if name in FIELDS}
        if stanza.get("Status") == INSTALLED and "Package" in stanza:
            yield stanza


def _names(relation: str) -> Iterable[str]:
    """Return the names in a field of dependencies: ``a (>= 1), b:any | c``."""
    for alternative in re.split(r"[,|]", relation):
        if match := _NAME.match(alternative.strip()):
            yield match[0]
