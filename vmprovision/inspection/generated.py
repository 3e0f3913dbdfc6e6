"""Guests that are generated from a configuration of their own: NixOS and Guix System.

Their ``/etc`` leads into a store of packages, which also holds process 1. Most other
markers are made only at the first boot. So an image that was never started is
recognised by its store, system profile and boot menu. Another distribution with only
the package manager Nix or Guix has a store too, but no system profile.

NixOS manual, "Building a NixOS (Linux) image"; Guix manual, "Invoking guix system".
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.filesystem.protocol import read_text
from vmprovision.guest.facts import Distribution, InitVerdict
from vmprovision.inspection.distribution import UNKNOWN

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1

Generator = Literal["nixos", "guix"]
NAMES: dict[Generator, str] = {"nixos": "NixOS", "guix": "Guix System"}
PROGRAMS: dict[Generator, str] = {"nixos": "systemd", "guix": "shepherd"}
STORES: dict[Generator, str] = {"nixos": "/nix/store", "guix": "/gnu/store"}
# Paths that only the whole system has; some are links that dangle until the first boot.
MARKS: dict[Generator, tuple[str, ...]] = {
    "nixos": ("/etc/NIXOS", "/nix/var/nix/profiles/system", "/nix-path-registration"),
    "guix": ("/var/guix/profiles/system",),
}
GRUB = PurePosixPath("/boot/grub/grub.cfg")


def find_generator(
    reader: GuestReader, distribution: Distribution, pid1: Pid1
) -> tuple[Generator, str] | None:
    """Return what generates this guest's files, with the evidence, or None for others."""
    for name, store in STORES.items():
        if distribution.id == name:
            return name, f"its release file says that it is {NAMES[name]}"
        for mark in MARKS[name]:
            if reader.lstat(PurePosixPath(mark)) is not None:
                return name, f"{mark} is there"
        sentence = next((each for each in pid1.evidence if f"init={store}/" in each), None)
        if sentence:
            return name, sentence
        if distribution != UNKNOWN or reader.lstat(PurePosixPath(store)) is None:
            continue
        if "gnu.system=" in (read_text(reader, GRUB) or "") or pid1.program == "none":
            return name, f"{store} is there, and neither a release file nor an init outside it"
    return None


def as_generated(
    found: tuple[Generator, str], distribution: Distribution, pid1: Pid1
) -> tuple[Distribution, InitVerdict]:
    """Return distribution and verdict of such a guest; only its own configuration adds services."""
    name, why = found
    if distribution.id != name:
        version = re.search(r"nixos-system-.+-(\d\d\.\d\d[\w.]*)", " ".join(pid1.evidence))
        distribution = Distribution(
            id=name, product_name=NAMES[name], version=version[1] if version else ""
        )
    evidence = (why, f"{NAMES[name]} builds its /etc and its services from its own configuration")
    return distribution, InitVerdict(
        system=None, pid1=PROGRAMS[name], confidence="unknown", evidence=evidence
    )
