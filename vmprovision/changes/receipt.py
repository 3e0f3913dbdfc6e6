"""The receipt that an injection leaves in the guest: what it wrote, and what was there before.

``verify``, upgrade and ``remove`` use it. It has no time and nothing of the host, so a
second injection writes the same bytes. Guest content is hostile, so a receipt is only a
claim: this module parses it with limits, and ``inspection/installed.py`` compares it
with what an injection can have written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from vmprovision.changes.conditions import (
    BlockCondition,
    DirectoryCondition,
    FileCondition,
    RequestCondition,
    SymlinkCondition,
)
from vmprovision.errors import InspectionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmprovision.changes.conditions import Condition

AGENT = PurePosixPath("/usr/local/bin/guest-agent")
CONFIGURATION = PurePosixPath("/etc/guest-agent.conf")
FOLDER = PurePosixPath("/usr/local/lib/guest-agent")
RUNTIME = FOLDER / "python"
RECEIPT = FOLDER / "receipt.json"
SET_ASIDE = FOLDER / "set-aside"
# Exists while a directory is being changed: a receipt of all that may have changed.
UNFINISHED = PurePosixPath("/.vmprovision-unfinished")
# Made by the agent itself under an init system that does not keep its log.
LOGS = (PurePosixPath("/var/log/guest-agent.log"), PurePosixPath("/var/log/guest-agent.log.1"))

SCHEMA = 1
RECEIPT_LIMIT = 1 << 20  # bytes; a usual receipt has 20 KiB
ENTRY_LIMIT = 1000
DIGIT_LIMIT = 12  # digits of a number; an owner's ID has at most ten
_FOUND_KINDS = ("absent", "file", "directory", "symlink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The content of a guest path before the injection.

    Attributes:
        kind: ``absent``, ``file``, ``directory`` or ``symlink``.
        content: a file's content, only in memory; the receipt has ``sha256`` and
            ``kept``.
        kept: the guest path of the copy that was set aside.
        believed: False if a user other than root could have written this, for a
            directory of root's.
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
    believed: bool = True


ABSENT = Found(kind="absent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One path of an injection: its end condition, and what was there before."""

    condition: Condition
    before: Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """All paths of one injection, in the order of its plan."""

    agent_version: str
    init: str
    entries: tuple[Entry, ...]

    @property
    def paths(self) -> tuple[PurePosixPath, ...]:
        """Every path in the receipt, including the copies that were set aside."""
        written = [entry.condition.path for entry in self.entries]
        kept = [entry.before.kept for entry in self.entries if entry.before.kept]
        return tuple(dict.fromkeys([*written, *kept]))

    def entry_for(self, path: PurePosixPath) -> Entry | None:
        """Return the entry for a path, or None."""
        return next((entry for entry in self.entries if entry.condition.path == path), None)


def serialise_receipt(receipt: Receipt) -> bytes:
    """Return the receipt as JSON with sorted keys and one line feed at the end."""
    document = {
        "schema": SCHEMA,
        "agent_version": receipt.agent_version,
        "init": receipt.init,
        "entries": [
            {
                "kind": entry.condition.kind,
                **_filled(entry.condition),
                "before": {
                    key: value
                    for key, value in _filled(entry.before).items()
                    if key not in ("content", "believed")
                },
            }
            for entry in receipt.entries
        ],
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("ascii")


def _filled(record: Condition | Found) -> dict[str, Any]:
    """Return the fields of a record that have a value: paths as text, modes in octal."""
    values: dict[str, Any] = {}
    for name in [field.name for field in fields(record)]:
        value = getattr(record, name)
        if value is None:
            continue
        if name == "mode":
            value = f"{value:04o}"
        values[name] = str(value) if isinstance(value, PurePosixPath) else value
    return values


def parse_receipt(content: bytes, path: PurePosixPath = RECEIPT) -> Receipt:
    """Parse the receipt that a guest holds.

    Args:
        content: at most ``RECEIPT_LIMIT`` bytes.
        path: where it was read, for the message.

    Raises:
        InspectionError: the receipt is damaged, forged, or from another version.
    """
    try:
        document = json.loads(
            content.decode("utf-8"),  # json.loads would guess the encoding
            parse_int=_integer,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
            object_pairs_hook=_fields,
        )
        if not isinstance(document, dict) or type(document["schema"]) is not int:
            raise ValueError("no schema")  # noqa: TRY301 -- one error for every damage
        if document["schema"] != SCHEMA:
            raise InspectionError(
                f"guest file {path} is from another version of vmprovision",
                hint="use that version for verify, inject or remove",
            )
        entries = document["entries"]
        if not isinstance(entries, list) or len(entries) > ENTRY_LIMIT:
            raise ValueError("no list of entries, or too long")  # noqa: TRY301 -- likewise
        receipt = Receipt(
            agent_version=_text(document["agent_version"], r"[0-9A-Za-z.+-]{1,40}"),
            init=_text(document["init"], r"[a-z0-9-]{1,20}"),
            entries=tuple(_parse_entry(entry) for entry in entries),
        )
        if len({entry.condition.path for entry in receipt.entries}) != len(entries):
            raise ValueError("a path occurs twice")  # noqa: TRY301 -- likewise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise InspectionError(
            f"guest file {path} is damaged: {type(exc).__name__}, {str(exc)[:200]}",
            hint="delete it in the guest to inject as if for the first time",
        ) from exc
    return receipt


def _integer(digits: str) -> int:
    if len(digits) > DIGIT_LIMIT:
        raise ValueError("too large a number")
    return int(digits)


def _refuse_number(_number: str) -> None:
    raise ValueError("a number that is not an integer")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _parse_entry(entry: Mapping[str, Any]) -> Entry:
    parse = _CONDITIONS[_one_of(entry["kind"], tuple(_CONDITIONS))]
    condition = parse(_path(entry["path"]), entry)
    return Entry(condition=condition, before=_parse_found(entry["before"]))


def _parse_directory(path: PurePosixPath, entry: Mapping[str, Any]) -> DirectoryCondition:
    return DirectoryCondition(path=path, label=_label(entry.get("label")))


def _parse_file(path: PurePosixPath, entry: Mapping[str, Any]) -> FileCondition:
    return FileCondition(
        path=path,
        mode=_optional(_mode, entry, "mode"),
        uid=_optional(_number, entry, "uid"),
        gid=_optional(_number, entry, "gid"),
        sha256=_optional(_hash, entry, "sha256"),
        label=_label(entry.get("label")),
    )


def _parse_symlink(path: PurePosixPath, entry: Mapping[str, Any]) -> SymlinkCondition:
    return SymlinkCondition(
        path=path, target=_line(entry["target"]), label=_label(entry.get("label"))
    )


def _parse_block(path: PurePosixPath, entry: Mapping[str, Any]) -> BlockCondition:
    return BlockCondition(
        path=path,
        name=_line(entry["name"]),
        mode=_mode(entry["mode"]),
        sha256=_hash(entry["sha256"]),
    )


def _parse_request(path: PurePosixPath, _entry: Mapping[str, Any]) -> RequestCondition:
    return RequestCondition(path=path)


# kind -> the parser of such a condition
_CONDITIONS: dict[str, Callable[[PurePosixPath, Mapping[str, Any]], Condition]] = {
    "directory": _parse_directory,
    "file": _parse_file,
    "symlink": _parse_symlink,
    "block": _parse_block,
    "request": _parse_request,
}


def _parse_found(before: Mapping[str, Any]) -> Found:
    found = Found(
        kind=_one_of(before["kind"], _FOUND_KINDS),
        mode=_optional(_mode, before, "mode"),
        uid=_optional(_number, before, "uid"),
        gid=_optional(_number, before, "gid"),
        label=_label(before.get("label")),
        target=_optional(_line, before, "target"),
        sha256=_optional(_hash, before, "sha256"),
        kept=_path(before["kept"]) if "kept" in before else None,
    )
    is_file, is_link = found.kind == "file", found.kind == "symlink"
    if (is_file and found.mode is None) or (is_link and found.target is None):
        raise ValueError("a file without a mode, or a link without a target")
    if is_file != (found.sha256 is not None) or is_file != (found.kept is not None):
        raise ValueError("a file has a copy, and nothing else has")
    if found.kept is not None and found.kept.name != found.sha256:
        raise ValueError("a copy is not named by its content")
    return found


def _path(value: str) -> PurePosixPath:
    path = PurePosixPath(_text(value, r"/[^\0]{1,4000}"))
    if ".." in path.parts or str(path) != value:
        raise ValueError(f"not a plain absolute path: {value[:80]!r}")
    return path


def _text(value: str, pattern: str) -> str:
    value.encode("utf-8")  # half of a surrogate pair cannot occur in a guest
    if not re.fullmatch(pattern, value):
        raise ValueError(f"unexpected text {value[:80]!r}")
    return value


def _line(value: str) -> str:
    return _text(value, r"[^\0\n]{1,4000}")


_Value = TypeVar("_Value")


def _optional(
    parse: Callable[[Any], _Value], fields: Mapping[str, Any], name: str
) -> _Value | None:
    value = fields.get(name)
    return None if value is None else parse(value)


def _label(value: str | None) -> str | None:
    return None if value is None else _text(value, r"[!-~]{1,1024}")


def _one_of(value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"unexpected kind {str(value)[:80]!r}")
    return value


def _mode(value: str) -> int:
    return int(_text(value, r"[0-7]{1,4}"), 8)


def _number(value: int) -> int:
    # -1 and 2**32 - 1 mean "leave it as it is" to chown(2)
    if type(value) is not int or not 0 <= value < (1 << 32) - 1:
        raise ValueError("not an owner")
    return value


def _hash(value: str) -> str:
    return _text(value, r"[0-9a-f]{64}")
