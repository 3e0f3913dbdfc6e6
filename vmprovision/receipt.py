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

from vmprovision.errors import InspectionError, PlanError
from vmprovision.filesystem import read_all
from vmprovision.plan import (
    FILE_LIMIT,
    Condition,
    EditBlock,
    MakeDirectory,
    Operation,
    Plan,
    Remove,
    Symlink,
    WriteFile,
    digest,
    strip_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmprovision.filesystem import GuestReader
    from vmprovision.guest import GuestInfo

AGENT = PurePosixPath("/usr/local/bin/guest-agent")
CONFIGURATION = PurePosixPath("/etc/guest-agent.conf")
FOLDER = PurePosixPath("/usr/local/lib/guest-agent")
RECEIPT = FOLDER / "receipt.json"
SET_ASIDE = FOLDER / "set-aside"
# What the agent itself makes when it runs without an init system that keeps its log.
LOGS = (PurePosixPath("/var/log/guest-agent.log"), PurePosixPath("/var/log/guest-agent.log.1"))

SCHEMA = 1
ENTRY_LIMIT = 1000
_CONDITION_KINDS = ("directory", "file", "symlink", "block")
_FOUND_KINDS = ("absent", "file", "directory", "symlink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What stood at a guest path before the injection.

    Attributes:
        kind: ``absent``, ``file``, ``directory`` or ``symlink``.
        content: of a file, while it is at hand; the receipt keeps ``sha256`` and
            the path where the content was set aside.
    """

    kind: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    label: str | None = None
    target: str | None = None
    sha256: str | None = None
    content: bytes | None = None


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


def survey(paths: Iterable[PurePosixPath], reader: GuestReader) -> dict[PurePosixPath, Found]:
    """What stands at these guest paths now, contents included.

    Raises:
        InspectionError: a path cannot be read, or holds more than we would set aside.
        PlanError: something stands there that can be neither kept nor restored.
    """
    return {path: look_at(path, reader) for path in paths}


def look_at(path: PurePosixPath, reader: GuestReader) -> Found:
    """What stands at one guest path now, its content included."""
    status = reader.lstat(path)
    if status is None:
        return ABSENT
    if status.kind == "other":
        raise PlanError(
            f"guest path {path} is a device, pipe or socket", hint="move it out of the way"
        )
    content = read_all(reader, path, FILE_LIMIT) if status.kind == "file" else None
    return Found(
        kind=status.kind,
        mode=status.mode,
        uid=status.uid,
        gid=status.gid,
        label=reader.label(path),
        target=reader.readlink(path) if status.kind == "symlink" else None,
        sha256=digest(content) if content is not None else None,
        content=content,
    )


def set_aside_path(found: Found) -> PurePosixPath:
    """Where the content of a file that stood in our way is kept in the guest."""
    return SET_ASIDE / str(found.sha256)


def with_receipt(
    plan: Plan, guest: GuestInfo, found: Mapping[PurePosixPath, Found], agent_version: str
) -> Plan:
    """The plan completed for a guest in which this was found: set aside, restore, receipt.

    Directories that are there already and not by us are left out.  What an
    earlier injection put where this one puts nothing is restored first.  The
    enabling operation stays last.
    """
    earlier = guest.agent.receipt if guest.agent else None
    wanted = [operation for operation in plan.operations if _is_wanted(operation, earlier, found)]
    entries = [
        Entry(condition=operation.condition, before=_before(operation.path, earlier, found))
        for operation in wanted
    ]
    stale = _stale_entries(earlier, entries)
    kept = [
        WriteFile(
            path=set_aside_path(entry.before),
            content=entry.before.content,
            mode=0o600,
        )
        for entry in entries
        if entry.before.content is not None
    ]
    kept = list({operation.path: operation for operation in kept}.values())
    aside = [Entry(condition=operation.condition, before=ABSENT) for operation in kept]
    aside += _kept_entries(earlier, [*entries, *aside])
    folder = MakeDirectory(path=SET_ASIDE, mode=0o700)
    folders = [folder] if aside else []
    aside += [Entry(condition=folder.condition, before=ABSENT) for folder in folders]
    receipt = Receipt(
        agent_version=agent_version, init=str(guest.init.system), entries=(*aside, *entries)
    )
    directories = [operation for operation in wanted if isinstance(operation, MakeDirectory)]
    rest = [operation for operation in wanted if not isinstance(operation, MakeDirectory)]
    written = WriteFile(path=RECEIPT, content=serialise_receipt(receipt), mode=0o600)
    restored = [
        operation
        for entry in stale
        for operation in restoration(entry, found.get(entry.condition.path, ABSENT), found)
    ]
    return Plan(
        operations=(
            *directories, *folders, *kept, *restored, *rest[:-1], written, *rest[-1:]
        ),
        notes=plan.notes,
    )


def _is_wanted(
    operation: Operation, earlier: Receipt | None, found: Mapping[PurePosixPath, Found]
) -> bool:
    if not isinstance(operation, MakeDirectory):
        return True
    ours = earlier is not None and earlier.entry_for(operation.path) is not None
    return ours or found[operation.path].kind != "directory"


def _before(
    path: PurePosixPath, earlier: Receipt | None, found: Mapping[PurePosixPath, Found]
) -> Found:
    """What stood at a path before the *first* injection."""
    entry = earlier.entry_for(path) if earlier else None
    return entry.before if entry else found[path]


def _stale_entries(earlier: Receipt | None, entries: Iterable[Entry]) -> list[Entry]:
    """What the earlier injection put where this one puts nothing, last first."""
    if earlier is None:
        return []
    now = {entry.condition.path for entry in entries}
    return [
        entry
        for entry in reversed(earlier.entries)
        if entry.condition.path not in now and not _is_set_aside(entry.condition.path)
    ]


def _kept_entries(earlier: Receipt | None, entries: list[Entry]) -> list[Entry]:
    """The earlier injection's set-aside files that are still somebody's only copy."""
    if earlier is None:
        return []
    now = {entry.condition.path for entry in entries}
    needed = {set_aside_path(entry.before) for entry in entries if entry.before.kind == "file"}
    return [entry for entry in earlier.entries if entry.condition.path in needed - now]


def _is_set_aside(path: PurePosixPath) -> bool:
    return path == SET_ASIDE or path.parent == SET_ASIDE


def restoration(
    entry: Entry, now: Found, found: Mapping[PurePosixPath, Found]
) -> list[Operation]:
    """What brings back what stood at a path before; nothing where all is as it was.

    Args:
        entry: the path's entry in the receipt.
        now: what stands there now.
        found: a survey that holds the set-aside files.

    Raises:
        PlanError: the set-aside content is gone or was changed.
    """
    path, before = entry.condition.path, entry.before
    if entry.condition.kind == "block" and now.kind == "file" and now.content is not None:
        bare = strip_blocks(entry.condition.name or "", now.content)
        if before.kind == "absent" and not _is_ours_alone(bare):
            return [EditBlock(path=path, name=entry.condition.name or "", content=b"")]
        if before.kind == "file" and not _same_lines(bare, before):
            # somebody edited the file after the injection: their lines stay
            return [EditBlock(path=path, name=entry.condition.name or "", content=b"")]
    if before.kind == "absent":
        return [Remove(path=path)]
    if before.kind == "symlink":
        return [
            Symlink(
                path=path,
                target=before.target or "",
                uid=before.uid or 0,
                gid=before.gid or 0,
                label=before.label,
            )
        ]
    if before.kind == "directory":
        return []
    kept = found.get(set_aside_path(before), ABSENT)
    if kept.sha256 != before.sha256 or kept.content is None:
        raise PlanError(
            f"what stood at guest path {path} cannot be restored: its copy "
            f"{set_aside_path(before)} is missing or was changed",
            hint="restore the image from its own backup",
        )
    return [
        WriteFile(
            path=path,
            content=kept.content,
            mode=before.mode or 0,
            uid=before.uid or 0,
            gid=before.gid or 0,
            label=before.label,
        )
    ]


def _is_ours_alone(bare: bytes) -> bool:
    """Whether nothing but the prologue that we began a file with is left of it."""
    lines = [line for line in bare.splitlines() if line.strip()]
    return all(line.startswith(b"#!") for line in lines) and len(lines) <= 1


def _same_lines(bare: bytes, before: Found) -> bool:
    return before.sha256 in (digest(bare), digest(bare.removesuffix(b"\n")))


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
        ),
        before=Found(
            kind=_one_of(before["kind"], _FOUND_KINDS),
            mode=_mode(before.get("mode")),
            uid=_number(before.get("uid")),
            gid=_number(before.get("gid")),
            label=_optional_text(before.get("label")),
            target=_optional_text(before.get("target")),
            sha256=_hash(before.get("sha256")),
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
