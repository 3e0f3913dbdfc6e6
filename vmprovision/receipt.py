"""The receipt that an injection leaves in the guest: what it put where, and what stood there.

``verify``, upgrade and ``remove`` work from it.  It holds no time and nothing
of the host, so injecting twice leaves the same bytes.  Guest content is
hostile: a receipt is parsed with limits and every path in it is checked, though
whoever can write it can write the rest of the guest too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmprovision.errors import InspectionError
from vmprovision.plan import Condition

if TYPE_CHECKING:
    from collections.abc import Mapping

AGENT = PurePosixPath("/usr/local/bin/guest-agent")
CONFIGURATION = PurePosixPath("/etc/guest-agent.conf")
FOLDER = PurePosixPath("/usr/local/lib/guest-agent")
RUNTIME = FOLDER / "python"
RECEIPT = FOLDER / "receipt.json"
SET_ASIDE = FOLDER / "set-aside"
# What the agent itself makes when it runs without an init system that keeps its log.
LOGS = (PurePosixPath("/var/log/guest-agent.log"), PurePosixPath("/var/log/guest-agent.log.1"))

SCHEMA = 1
ENTRY_LIMIT = 1000
_CONDITION_KINDS = ("directory", "file", "symlink", "block", "request")
_FOUND_KINDS = ("absent", "file", "directory", "symlink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What stood at a guest path before the injection.

    Attributes:
        kind: ``absent``, ``file``, ``directory`` or ``symlink``.
        content: of a file, while it is at hand; the receipt has ``sha256`` and ``kept``.
        kept: the guest path at which the content of a file was set aside.
    """

    kind: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    label: str | None = None
    target: str | None = None
    sha256: str | None = None
    content: bytes | None = None
    kept: PurePosixPath | None = None


ABSENT = Found(kind="absent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One path of an injection: what must be there now, and what stood there before."""

    condition: Condition
    before: Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Everything that one injection is about, in the order of its plan."""

    agent_version: str
    init: str
    entries: tuple[Entry, ...]

    def entry_for(self, path: PurePosixPath) -> Entry | None:
        """The entry of a path, if the receipt has one."""
        return next((entry for entry in self.entries if entry.condition.path == path), None)


def serialise_receipt(receipt: Receipt) -> bytes:
    """The receipt's file: JSON, sorted keys, one line feed at the end."""
    document = {
        "schema": SCHEMA,
        "agent_version": receipt.agent_version,
        "init": receipt.init,
        "entries": [
            {
                **_filled(entry.condition),
                "before": {
                    key: value for key, value in _filled(entry.before).items() if key != "content"
                },
            }
            for entry in receipt.entries
        ],
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("ascii")


def _filled(record: Condition | Found) -> dict[str, Any]:
    """The fields of a record that have a value; paths as text, modes in octal."""
    values: dict[str, Any] = {}
    for name in record.__slots__:
        value = getattr(record, name)
        if value is None:
            continue
        if name == "mode":
            value = f"{value:04o}"
        values[name] = str(value) if isinstance(value, PurePosixPath) else value
    return values


def parse_receipt(content: bytes) -> Receipt:
    """The receipt that a guest holds.

    Raises:
        InspectionError: it is damaged, forged, or of a later vmprovision.
    """
    try:
        document = json.loads(content)
        if document["schema"] != SCHEMA:
            raise InspectionError(
                f"guest file {RECEIPT} is of another version of vmprovision",
                hint="use that version to verify, upgrade or remove",
            )
        entries = document["entries"]
        if len(entries) > ENTRY_LIMIT:
            raise ValueError("too many entries")  # noqa: TRY301 -- one error for every damage
        return Receipt(
            agent_version=_text(document["agent_version"], r"[0-9A-Za-z.+-]{1,40}"),
            init=_text(document["init"], r"[a-z0-9-]{1,20}"),
            entries=tuple(_parse_entry(entry) for entry in entries),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise InspectionError(
            f"guest file {RECEIPT} is damaged: {exc!r}",
            hint="delete it in the guest to inject as if for the first time",
        ) from exc


def _parse_entry(entry: Mapping[str, Any]) -> Entry:
    before = entry["before"]
    kind = _one_of(entry["kind"], _CONDITION_KINDS)
    return Entry(
        condition=Condition(
            path=_path(entry["path"]),
            kind=kind,  # type: ignore[arg-type]  # one of the literal's values, checked above
            mode=_mode(entry.get("mode")),
            uid=_number(entry.get("uid")),
            gid=_number(entry.get("gid")),
            sha256=_hash(entry.get("sha256")),
            target=_optional_text(entry.get("target")),
            name=_optional_text(entry.get("name")),
            label=_optional_text(entry.get("label")),
        ),
        before=Found(
            kind=_one_of(before["kind"], _FOUND_KINDS),
            mode=_mode(before.get("mode")),
            uid=_number(before.get("uid")),
            gid=_number(before.get("gid")),
            label=_optional_text(before.get("label")),
            target=_optional_text(before.get("target")),
            sha256=_hash(before.get("sha256")),
            kept=_path(before["kept"]) if "kept" in before else None,
        ),
    )


def _path(value: str) -> PurePosixPath:
    path = PurePosixPath(_text(value, r"/[^\0]{1,4000}"))
    if ".." in path.parts or str(path) != value:
        raise ValueError(f"not a plain absolute path: {value!r}")
    return path


def _text(value: str, pattern: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ValueError(f"unexpected text {value[:80]!r}")
    return value


def _optional_text(value: str | None) -> str | None:
    return None if value is None else _text(value, r"[^\0\n]{1,4000}")


def _one_of(value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"unexpected kind {value!r}")
    return value


def _mode(value: str | None) -> int | None:
    return None if value is None else int(_text(value, r"[0-7]{1,4}"), 8)


def _number(value: int | None) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise ValueError(f"not an owner: {value!r}")
    return value


def _hash(value: str | None) -> str | None:
    return None if value is None else _text(value, r"[0-9a-f]{64}")
