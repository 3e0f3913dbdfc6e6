"""Refuse guests in which an injection would have no effect, or do harm."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import AmbiguousInitError, PlanError, UnsupportedGuestError
from vmprovision.filesystem.protocol import LinkCircleError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmprovision.guest.facts import GuestInfo, InitVerdict
    from vmprovision.runtime.archive import Archive

# Directories that the kernel or the init system recreates at each boot.
VOLATILE = tuple(PurePosixPath(path) for path in ("/dev", "/proc", "/run", "/sys", "/tmp"))  # noqa: S108 -- the guest's


def refuse_hidden(guest: GuestInfo, paths: Iterable[PurePosixPath]) -> None:
    """Check that the running guest will see what is written to these paths (without links).

    Raises:
        UnsupportedGuestError: another filesystem covers a path, or it is on a sealed
            one.
        LinkCircleError: a path leads through a circle of links.
    """
    for path in paths:
        if circle := guest.circles.intersection(path.parents):
            raise LinkCircleError(
                f"guest path {path} cannot be written: {min(circle)} leads through a circle of "
                "links",
                hint="repair the links in the guest",
            )
        if hidden := guest.hidden_by(path):
            raise UnsupportedGuestError(
                f"guest path {path} would be hidden in the running guest: {hidden.sentence}",
                hint=hidden.mount.advice,
            )
        if seal := guest.sealed_by(path):
            raise UnsupportedGuestError(
                f"guest path {path} is on a sealed filesystem, "
                f"which any change makes unreadable: {seal.origin}",
                hint="`vmprovision seed` writes nothing to the image",
            )
        volatile = next((each for each in VOLATILE if path.is_relative_to(each)), None)
        if volatile:
            raise UnsupportedGuestError(
                f"guest path {path}, where a link of the guest leads, would be hidden in the "
                f"running guest: {volatile} is empty at each boot",
                hint=f"replace the link that leads into {volatile} by a directory",
            )


def refuse_unknown_init(verdict: InitVerdict) -> None:
    """Raise the error for a guest whose init system is unknown or not supported.

    Raises:
        AmbiguousInitError: the init system is unknown or in doubt.
        UnsupportedGuestError: it is known, but not supported.
    """
    if verdict.doubt or verdict.pid1 in ("none", "unknown", "script", "shell"):
        known = [hint.speaks_for for hint in verdict.hints or () if hint.kind != "boot"]
        names = ", ".join(dict.fromkeys(known))
        why = verdict.doubt or (
            f"the guest's init system is unknown: {'; '.join(verdict.evidence)}"
        )
        seen = f"; it has files of {names} (see `inspect --explain`)" if names else ""
        raise AmbiguousInitError(
            why,
            hint="state it with --init, e.g. --init standalone for a guest that runs rc.local"
            + seen,
        )
    raise UnsupportedGuestError(
        f"the guest's services are run by {verdict.pid1}, which is not supported",
        hint="if the guest runs /etc/rc.local at boot, use --init standalone",
    )


def refuse_downgrade(guest: GuestInfo, archive: Archive) -> None:
    """Check that the guest has no newer agent than this archive.

    Raises:
        PlanError: it has.
    """
    if guest.agent and _order(guest.agent.version) > _order(archive.version):
        raise PlanError(
            f"the guest has agent {guest.agent.version}, newer than {archive.version}",
            hint="use the vmprovision that injected it, or `vmprovision remove` it first",
        )


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
