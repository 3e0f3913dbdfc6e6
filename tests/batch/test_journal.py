"""The journal of a batch: which images are skipped, and what survives a crash."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, make_tree
from vmprovision.batch.journal import open_journal

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make a file of which only size and time matter."""
    made = tmp_path / "disk.raw"
    made.write_bytes(bytes(512))
    return made


def write(journal: Path, image: Path, wanted: str) -> None:
    """Record in a journal that an image is finished."""
    book = open_journal(journal)
    book.add(image, wanted)
    book.close()


def is_done(journal: Path, image: Path, wanted: str) -> bool:
    """Return whether a later run regards the image as finished."""
    book = open_journal(journal)
    try:
        return book.holds(image, wanted)
    finally:
        book.close()


def test_what_is_done_stays_done_until_something_changes(image: Path, tmp_path: Path) -> None:
    """An entry is invalid if the options, or the size or time of the image, differ."""
    journal = tmp_path / "journal"
    assert not is_done(journal, image, "a")
    write(journal, image, "a")
    assert is_done(journal, image, "a")
    assert not is_done(journal, image, "b")
    write(journal, image, "b")
    assert is_done(journal, image, "b")
    os.utime(image, ns=(1, 1))
    assert not is_done(journal, image, "b")
    write(journal, image, "b")
    status = image.stat()
    image.write_bytes(bytes(1024))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not is_done(journal, image, "b")
    image.unlink()
    assert not is_done(journal, image, "b")
    assert journal.stat().st_mode & 0o777 == 0o600


def test_a_line_torn_by_a_crash_costs_that_line_only(image: Path, tmp_path: Path) -> None:
    """Wherever writing was cut off, the next run reads the complete entries and appends to them."""
    journal, other = tmp_path / "journal", tmp_path / "other.raw"
    other.write_bytes(b"x")
    write(journal, image, "a")
    whole = journal.read_bytes()
    write(journal, other, "a")
    complete = journal.read_bytes()
    for length in range(len(whole), len(complete)):
        journal.write_bytes(complete[:length])
        write(journal, other, "b")
        assert is_done(journal, image, "a")
        assert is_done(journal, other, "b")


@pytest.mark.parametrize("content", [b"QFI\xfb" + bytes(508), b"{}\n", b"[1]\n{}\n", b"\n"])
def test_another_file_is_not_written_to(tmp_path: Path, content: bytes) -> None:
    """An image that is given as journal by mistake is not damaged."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(content)
    tree = make_tree(tmp_path / "tree", SYSTEMD_TREE)
    with pytest.raises(vmprovision.PlanError, match=r"disk\.qcow2"):
        vmprovision.inject_many([tree], journal=path)
    with pytest.raises(vmprovision.PlanError, match="tree"):
        vmprovision.inject_many([tree], journal=tree)
    assert path.read_bytes() == content
    assert not (tree / "etc/guest-agent.conf").exists()


def test_directories_are_looked_at_each_time(tmp_path: Path) -> None:
    """A directory is never recorded, and neither is a token."""
    tree, journal = make_tree(tmp_path / "tree", SYSTEMD_TREE), tmp_path / "journal"
    options = vmprovision.InjectOptions(token="abcdef0123456789")
    for outcome in ("injected", "unchanged"):
        report = vmprovision.inject_many([tree], options, journal=journal)
        assert [result.outcome for result in report.results] == [outcome]
    assert [json.loads(line) for line in journal.read_text().splitlines()] == [
        {"vmprovision": "journal", "schema": 1}
    ]
