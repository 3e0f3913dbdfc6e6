"""Read the guest's SELinux policy: its configuration, and the rules that label files.

``/etc/selinux/config`` (selinux(8)) names a policy, whose ``contexts/files`` hold the
rules (selabel_file(5)). A guest without SELinux costs one lookup.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.filesystem.protocol import read_text, resolved_file, status_of
from vmprovision.guest.shelltext import parse_assignments
from vmprovision.selinux.filecontexts import FileContextsError, parse_file_contexts
from vmprovision.selinux.policy import SELinuxPolicy

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.selinux.filecontexts import FileContexts

CONTEXTS_LIMIT = 4 << 20  # Debian's have 350 KB, Fedora's 500 KB
CONFIGURATION_LIMIT = 64 << 10
_POLICY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_MODES: dict[str, Literal["enforcing", "permissive", "disabled"]] = {
    "enforcing": "enforcing",
    "permissive": "permissive",
}
_RULES = ("file_contexts", "file_contexts.homedirs", "file_contexts.local")


def inspect_selinux(reader: GuestReader) -> SELinuxPolicy | None:
    """Return the SELinux configuration, or None if its policy is not installed."""
    text = read_text(reader, PurePosixPath("/etc/selinux/config"), CONFIGURATION_LIMIT)
    if text is None:
        return None
    values = dict(parse_assignments(text))
    policy = values.get("SELINUXTYPE", "targeted").strip()
    if not _POLICY.fullmatch(policy):  # the name becomes part of a path
        return None
    folder = PurePosixPath("/etc/selinux") / policy / "contexts/files"
    if not any(status_of(reader, folder / name) for name in (_RULES[0], f"{_RULES[0]}.bin")):
        return None
    mode = _MODES.get(values.get("SELINUX", "").strip().lower(), "disabled")
    if not reader.takes_labels():
        obstacle = "labels cannot be written to its filesystem from here"
        return SELinuxPolicy(mode=mode, policy=policy, obstacle=obstacle, takes_labels=False)
    try:
        return SELinuxPolicy(mode=mode, policy=policy, contexts=_read_contexts(reader, folder))
    except FileContextsError as exc:
        return SELinuxPolicy(mode=mode, policy=policy, obstacle=f"its rules are not usable: {exc}")


def _read_contexts(reader: GuestReader, folder: PurePosixPath) -> FileContexts:
    if status_of(reader, folder / _RULES[0]) is None:
        raise FileContextsError(f"only the compiled {folder / _RULES[0]}.bin is there")
    return parse_file_contexts(
        [_read(reader, folder / name) for name in _RULES],
        local=_read(reader, folder / "file_contexts.subs"),
        distribution=_read(reader, folder / "file_contexts.subs_dist"),
    )


def _read(reader: GuestReader, path: PurePosixPath) -> str:
    """Return a file of rules as Latin-1 text; empty if there is none."""
    real = resolved_file(reader, path)
    status = reader.lstat(real) if real else None
    if real is None or status is None:
        return ""
    if status.size > CONTEXTS_LIMIT:
        raise FileContextsError(f"{path} is larger than {CONTEXTS_LIMIT} bytes")
    return reader.read(real, limit=CONTEXTS_LIMIT).decode("latin-1")
