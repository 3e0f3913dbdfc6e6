"""Directories and files as the attendant of a restored appliance reads and makes them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from tests.appliance.test_pool import restored
from vmprovision.appliance.answers import Content, Described, Listing, Part, parse_parts
from vmprovision.appliance.drives import Drive
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.handle import ApplianceCallError
from vmprovision.errors import ApplianceError
from vmprovision.filesystem.protocol import SELINUX, Attributes
from vmprovision.host.command import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.appliance.snapshot.restore import RestoredAppliance
    from vmprovision.filesystem.protocol import FileKind

KNOWN = 20
MANY = 1500
LIMIT = 1000
LONG = "x" * 200
LABEL = "system_u:object_r:etc_t:s0"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestoredAppliance]:
    """A restored appliance with a guest that has odd names, links and sizes."""
    folder = tmp_path_factory.mktemp("listings")
    tree, disk = folder / "tree", folder / "disk.raw"
    make_tree(tree)
    disk.write_bytes(b"")
    os.truncate(disk, 64 << 20)
    run(["mkfs.ext4", "-q", "-d", tree, disk], timeout=120)
    with restored() as made:
        made.attach(Drive(path=disk, format="raw"))
        made.mount("/dev/sda", "ext4", "/", readonly=False)
        yield made
        made.finish()


def make_tree(tree: Path) -> None:
    """Make the guest's files."""
    odd = tree / "odd"
    odd.mkdir(parents=True)
    (odd / "two\nlines").write_bytes(b"x" * 70000)
    Path(os.fsdecode(os.fsencode(odd) + b"/\xff\xfe")).write_bytes(b"")
    (odd / "set").write_bytes(b"s")
    (odd / "set").chmod(0o4751)
    os.link(odd / "set", odd / "again")
    os.mkfifo(odd / "pipe")
    (odd / "absolute").symlink_to("/etc/passwd")
    (odd / "dangling").symlink_to("no/such/file")
    (odd / "long").symlink_to("/" + "/".join([LONG] * 4))
    (odd / "folder").mkdir(mode=0o1777)
    (tree / "empty").mkdir()
    (tree / "link").symlink_to("odd")
    (tree / "out").symlink_to("/proc")
    for name in ("some", "many"):
        (tree / name).mkdir()
    for number in range(KNOWN + 1):
        (tree / "some" / str(number)).write_bytes(b"")
    for number in range(MANY):
        (tree / "many" / f"{number:04}{LONG}").write_bytes(b"")


def entries(machine: RestoredAppliance, *places: str) -> list[Part]:
    """Ask for what these places hold."""
    return machine.entries(places, known=KNOWN, wanted=["7", "1*"], limit=LIMIT)


@pytest.mark.appliance
def test_a_listing_says_what_single_questions_say(machine: RestoredAppliance) -> None:
    """Names, statuses and targets, byte for byte."""
    (listing,) = entries(machine, "/odd")
    assert isinstance(listing, Listing)
    assert b"\xff\xfe" in listing.names
    assert sorted(listing.names) == sorted(listing.entries)
    assert len(listing.names) == 9
    names = [name.decode() for name in listing.names if name != b"\xff\xfe"]
    targets = machine.call("readlinklist", "/odd", names)
    statuses = machine.call("lstatnslist", "/odd", names)
    for name, target, status in zip(names, targets, statuses, strict=True):
        entry = listing.entries[name.encode()]
        assert entry.target.decode() == target
        assert_same(entry, status)
    assert listing.own is not None
    assert_same(listing.own, machine.call("lstatns", "/odd"))


def assert_same(found: Described, status: dict[str, int]) -> None:
    """Compare with a status of libguestfs."""
    fields = ("mode", "nlink", "uid", "gid", "size")
    assert [found.mode, found.links, found.uid, found.gid, found.size] == [
        status[f"st_{field}"] for field in fields
    ]


@pytest.mark.appliance
def test_places_are_read_together_or_not_at_all(machine: RestoredAppliance) -> None:
    """Missing ones, large files, links on the way, and what is too large have an error each."""
    asked = ["/", "/gone", "/odd/two\nlines", "/odd/pipe", "/link", "/out/self", "/many"]
    root, *failed = entries(machine, *asked)
    assert isinstance(root, Listing)
    assert set(root.names) == {*b"odd empty link out some many lost+found".split()}
    numbers = [errno.ENOENT, errno.E2BIG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.E2BIG]
    assert failed == numbers
    some, empty, file = entries(machine, "/some", "/empty", "/odd/set")
    assert isinstance(some, Listing)
    assert len(some.names) == KNOWN + 1
    assert {int(name) for name in some.entries} == {1, 7, *range(10, 20)}
    assert isinstance(empty, Listing)
    assert empty.names == ()
    assert empty.own is not None
    assert isinstance(file, Content)
    assert file.content == b"s"
    assert_same(file.own, machine.call("lstatns", "/odd/set"))


@pytest.mark.appliance
def test_statuses_of_names(machine: RestoredAppliance) -> None:
    """With their labels; no link is followed, on the way or at the end."""
    names = ["set", "absolute", "gone", "x" * 300, "."]
    found, link, *failed, own = machine.statuses("/odd", names)
    assert isinstance(found, Described)
    assert_same(found, machine.call("lstatns", "/odd/set"))
    assert found.label == b""
    assert isinstance(link, Described)
    assert link.target == b"/etc/passwd"
    assert failed == [errno.ENOENT, errno.ENAMETOOLONG]
    assert isinstance(own, Described)
    assert_same(own, machine.call("lstatns", "/odd"))
    assert machine.statuses("/link", ["set"]) == [errno.ENOTDIR]
    assert machine.statuses("/out", ["version"]) == [errno.ENOTDIR]
    machine.call("lsetxattr", SELINUX, LABEL, len(LABEL), "/odd/pipe")
    assert machine.read_label("/odd/pipe") == LABEL.encode()
    assert machine.read_label("/odd/set") is None


@pytest.mark.appliance
def test_what_is_made_has_its_attributes(machine: RestoredAppliance) -> None:
    """A file of many pieces, a directory and a link, with owner, mode and label."""
    content = random.Random(3).randbytes(300_001)
    owner = Attributes(mode=0o4711, uid=70000, gid=5, label=LABEL)
    made = machine.make("/empty/file", "file", content, owner)
    assert_same(made, machine.call("lstatns", "/empty/file"))
    assert (made.mode, made.uid, made.gid, made.size) == (0o104711, 70000, 5, len(content))
    assert made.label == LABEL.encode()
    assert machine.call("read_file", "/empty/file") == content
    made = machine.make("/empty/folder", "directory", b"", Attributes(mode=0o1750))
    assert (made.mode, made.label) == (0o41750, b"")
    made = machine.make("/empty/link", "symlink", b"../out/\xc3\xa9", Attributes(gid=3))
    assert (made.target, made.gid) == (b"../out/\xc3\xa9", 3)
    for name, kind in KINDS:
        machine.remove(f"/empty/{name}", kind)
    assert machine.call("ls", "/empty") == []


KINDS: tuple[tuple[str, FileKind], ...] = (
    ("file", "file"),
    ("folder", "directory"),
    ("link", "symlink"),
)


@pytest.mark.appliance
def test_nothing_is_made_over_something_or_through_a_link(machine: RestoredAppliance) -> None:
    """Whatever was there stays, and the attendant is ready for the next question."""
    long = b"x" * 5000
    refused: list[tuple[str, FileKind, bytes, int]] = [
        ("/odd/set", "file", long, errno.EEXIST),
        ("/odd/dangling", "file", long, errno.EEXIST),
        ("/odd/dangling", "directory", b"", errno.EEXIST),
        ("/odd/dangling", "symlink", b"x", errno.EEXIST),
        ("/link/new", "file", long * 100, errno.ENOTDIR),
        ("/gone/new", "file", long * 100, errno.ENOENT),
        ("/odd/new", "symlink", long, errno.ENAMETOOLONG),
        ("/out/new", "directory", b"", errno.ENOTDIR),
    ]
    for place, kind, content, number in refused:
        with pytest.raises(ApplianceCallError) as raised:
            machine.make(place, kind, content, Attributes(mode=0o644))
        assert raised.value.number == number, place
    assert machine.call("read_file", "/odd/set") == b"s"
    assert machine.statuses("/odd", ["new"]) == [errno.ENOENT]
    kept: list[tuple[str, FileKind, int]] = [
        ("/odd", "directory", errno.ENOTEMPTY),
        ("/odd", "file", errno.EISDIR),
        ("/gone", "file", errno.ENOENT),
        ("/link/set", "file", errno.ENOTDIR),
    ]
    for place, kind, number in kept:
        with pytest.raises(ApplianceCallError) as raised:
            machine.remove(place, kind)
        assert raised.value.number == number, place


@pytest.mark.appliance
def test_what_is_too_large_for_a_listing_is_seen_all_the_same(machine: RestoredAppliance) -> None:
    """It is asked for as in a stock appliance."""
    found = ApplianceFilesystem(machine).list_directory(PurePosixPath("/many"))
    assert len(found) == MANY


@pytest.mark.appliance
def test_bytes_of_files(machine: RestoredAppliance) -> None:
    """Of regular files only, through no link, and as many as there are."""
    path = "/odd/two\nlines"
    assert machine.read_file(path, 0, 10) == b"x" * 10
    assert machine.read_file(path, 69990, 100) == b"x" * 10
    assert machine.read_file(path, 80000, 100) == b""
    assert machine.read_file(path, 0, 1 << 20) == b"x" * 70000
    for other in ("/odd/pipe", "/odd/absolute", "/link/set", "/odd", "/out/version", "/gone"):
        with pytest.raises(ApplianceCallError) as raised:
            machine.read_file(other, 0, 10)
        assert raised.value.number, other


OWN = (1 << 32) - 1


def description(which: int, *fields: int, target: bytes = b"", label: bytes | None = None) -> bytes:
    """Return a description: ``fields`` are mode, links, uid, gid and size."""
    *status, size = fields
    labelled = OWN if label is None else len(label)
    head = struct.pack("=7IQ", which, *status, len(target), labelled, size)
    return head + target + (label or b"")


def answer(*parts: tuple[int, int, bytes]) -> bytes:
    """Return an answer of the attendant."""
    return b"".join(
        struct.pack("=III", number, kind, len(data)) + data for number, kind, data in parts
    )


FOLDER = description(OWN, 0o40755, 2, 0, 0, 4096, label=b"l")
LINK = description(1, 0o120777, 1, 2, 3, 5, target=b"to/a")
GOOD = answer(
    (0, 0, b"a\0b\0\0" + LINK + FOLDER),
    (2, 0, b""),
    (0, 0, b"c\0\0"),
    (0, 1, FOLDER + b"content"),
    (0, 2, LINK),
)


def test_an_answer_is_read_as_it_was_written() -> None:
    """With descriptions, without, and for a directory that could not be read."""
    folder = Described(mode=0o40755, links=2, uid=0, gid=0, size=4096, label=b"l")
    link = Described(mode=0o120777, links=1, uid=2, gid=3, size=5, target=b"to/a")
    assert parse_parts(GOOD) == [
        Listing(names=(b"a", b"b"), own=folder, entries={b"b": link}),
        2,
        Listing(names=(b"c",)),
        Content(own=folder, content=b"content"),
        link,
    ]


def test_a_damaged_answer_is_an_error() -> None:
    """A guest that has taken over the appliance can make nothing worse of it."""
    random_bytes = random.Random(5)
    refused = 0
    for _ in range(3000):
        bad = bytearray(GOOD[: random_bytes.randrange(1, len(GOOD) + 1)])
        for _ in range(random_bytes.randrange(4)):
            bad[random_bytes.randrange(len(bad))] = random_bytes.randrange(256)
        with contextlib.suppress(ApplianceError):
            parse_parts(bytes(bad))
            continue
        refused += 1
    assert refused > 1000
