"""Read the packages of an rpm database in SQLite's file format.

SQLite's own library is C, and a guest's file is hostile. So this module reads the few
structures that it needs, within the bytes of the file, each page once. Formats:
SQLite's "Database File Format" (pages, table B-trees, records) and rpm's header image
(``rpm-format``: an index of tags and their data).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"SQLite format 3\0"
INTERIOR, LEAF = 5, 13  # page types of a table
HEADER = 100  # size of the database header, before the first page's own header
DEPTH_LIMIT = 20
BLOB_LIMIT = 16 << 20  # one package's header; the largest have 1 MiB
TEXT_LIMIT = 4096
NAME, VERSION, RELEASE, EPOCH = 1000, 1001, 1002, 1003
LICENCE, ARCHITECTURE, SOURCE = 1014, 1022, 1044
TEXTS = (NAME, VERSION, RELEASE, LICENCE, ARCHITECTURE, SOURCE)
INT32, STRING, STRINGS, I18N = 4, 6, 8, 9
SIGNATURES = "gpg-pubkey"  # rpm stores trusted keys as packages of this name


@dataclass(frozen=True, slots=True, kw_only=True)
class RpmHeader:
    """The needed fields of one package's header; ``version`` is version and release."""

    name: str
    version: str
    epoch: str
    architecture: str
    licence: str
    source: str


def read_rpm_database(content: bytes, limit: int) -> Iterator[RpmHeader]:
    """Yield the packages of a database, at most ``limit`` and one more.

    Raises:
        ValueError: the database is damaged or not rpm's.
    """
    try:
        database = _Database(content)
        for row in database.rows(_root_of(database, b"Packages"), limit + 1):
            blob = next((value for value in row if isinstance(value, bytes)), b"")
            header = _parse_header(blob)
            if header.name != SIGNATURES:
                yield header
    except (struct.error, IndexError) as exc:
        raise ValueError("it is damaged") from exc


def _root_of(database: _Database, table: bytes) -> int:
    """Return the first page of a table, from the schema table on page 1."""
    for row in database.rows(1, 1000):
        kind, _, name, root = row[:4]
        if kind == b"table" and name == table and isinstance(root, int):
            return root
    raise ValueError("it has no table Packages")


class _Database:
    """The tables of a SQLite file."""

    def __init__(self, content: bytes) -> None:
        if not content.startswith(MAGIC):
            raise ValueError("it is not an SQLite database")
        (size,) = struct.unpack_from(">H", content, 16)
        self._size = 65536 if size == 1 else size
        self._usable = self._size - content[20]
        if self._size < 512 or self._size & (self._size - 1) or self._usable < 480:  # noqa: PLR2004 -- the format's limits
            raise ValueError("its page size is impossible")
        self._content = content
        self._seen: set[int] = set()

    def rows(self, root: int, limit: int) -> Iterator[list[bytes | int | None]]:
        """Yield at most ``limit`` rows of the table whose B-tree begins at a page."""
        self._seen = set()
        for number, payload in enumerate(self._payloads(root, 0)):
            if number == limit:
                return
            yield _record(payload)

    def _page(self, number: int) -> bytes:
        """Return a page; raise an error for a page taken before, so that no circle is followed."""
        if number in self._seen or not 0 < number <= len(self._content) // self._size:
            raise ValueError("its pages are damaged")
        self._seen.add(number)
        return self._content[(number - 1) * self._size : number * self._size]

    def _payloads(self, number: int, depth: int) -> Iterator[bytes]:
        if depth > DEPTH_LIMIT:
            raise ValueError("its pages are damaged")
        page = self._page(number)
        start = HEADER if number == 1 else 0
        kind, count = page[start], struct.unpack_from(">H", page, start + 3)[0]
        if kind not in (INTERIOR, LEAF):
            raise ValueError("its pages are damaged")
        cells = struct.unpack_from(f">{count}H", page, start + (12 if kind == INTERIOR else 8))
        for cell in cells:
            if kind == INTERIOR:
                yield from self._payloads(struct.unpack_from(">I", page, cell)[0], depth + 1)
            else:
                yield self._payload(page, cell)
        if kind == INTERIOR:
            (rightmost,) = struct.unpack_from(">I", page, start + 8)
            yield from self._payloads(rightmost, depth + 1)

    def _payload(self, page: bytes, cell: int) -> bytes:
        """Return a cell's payload, including its overflow pages."""
        size, at = _varint(page, cell)
        _, at = _varint(page, at)
        if size > BLOB_LIMIT:
            raise ValueError("a package's header is too large")
        most = self._usable - 35
        if size <= most:
            return page[at : at + size]
        least = (self._usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (self._usable - 4)
        local = local if local <= most else least
        parts = [page[at : at + local]]
        (following,) = struct.unpack_from(">I", page, at + local)
        left = size - local
        while left > 0:
            more = self._page(following)
            (following,) = struct.unpack_from(">I", more, 0)
            parts.append(more[4 : min(self._usable, 4 + left)])
            left -= self._usable - 4
        return b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at an offset, and the offset after it."""
    value = 0
    for number in range(9):
        byte = data[at + number]
        if number == 8:  # noqa: PLR2004 -- the ninth byte has eight bits
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            return value, at + number + 1
    raise AssertionError


def _record(payload: bytes) -> list[bytes | int | None]:
    """Return the values of a row: text and blobs as bytes, real numbers as None."""
    end, at = _varint(payload, 0)
    body = end
    values: list[bytes | int | None] = []
    while at < end:
        kind, at = _varint(payload, at)
        size = (kind - 12) // 2 if kind >= 12 else (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)[kind]  # noqa: PLR2004
        raw = payload[body : body + size]
        body += size
        if kind >= 12:  # noqa: PLR2004 -- text and blobs
            values.append(raw)
        elif kind in (8, 9):
            values.append(kind - 8)
        else:
            values.append(int.from_bytes(raw, "big", signed=True) if 0 < kind < 7 else None)  # noqa: PLR2004
    return values


def _parse_header(blob: bytes) -> RpmHeader:
    """Parse rpm's header image: two counts, an index of 16 bytes per tag, the data."""
    count, size = struct.unpack_from(">II", blob, 0)
    start = 8 + count * 16
    if start + size > len(blob):
        raise ValueError("a package's header is damaged")
    texts: dict[int, str] = {}
    for tag, kind, offset, _ in struct.iter_unpack(">IIII", blob[8:start]):
        place = start + offset
        if kind in (STRING, STRINGS, I18N) and tag in TEXTS:
            end = blob.find(b"\0", place)
            texts.setdefault(
                tag, blob[place : end if end >= 0 else None].decode("utf-8", "replace")
            )
        elif tag == EPOCH and kind == INT32:
            texts.setdefault(tag, str(struct.unpack_from(">I", blob, place)[0]))
    if not texts.get(NAME) or not texts.get(VERSION):
        raise ValueError("a package has no name or version")
    return RpmHeader(
        name=texts[NAME],
        version="-".join(filter(None, (texts[VERSION], texts.get(RELEASE)))),
        epoch=texts.get(EPOCH, ""),
        architecture=texts.get(ARCHITECTURE, ""),
        licence=texts.get(LICENCE, ""),
        source=texts.get(SOURCE, ""),
    )
