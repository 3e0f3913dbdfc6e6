"""Directories and files as the attendant of a restored appliance reads them."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from tests.appliance.test_pool import restored
from vmprovision.appliance.drives import Drive
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.handle import ApplianceCallError
from vmprovision.appliance.listings import Described, Listing, parse_listings
from vmprovision.errors import ApplianceError
from vmprovision.host.command import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.appliance.snapshot.restore import RestoredAppliance

KNOWN = 20
MANY = 1500
LONG = "x" * 200


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


@pytest.mark.appliance
def test_a_listing_says_what_single_questions_say(machine: RestoredAppliance) -> None:
    """Names, statuses and targets, byte for byte."""
    (listing,) = machine.list_directories(["/odd"], KNOWN)
    assert listing is not None
    assert b"\xff\xfe" in listing.names
    assert sorted(listing.names) == sorted(listing.entries)
    assert len(listing.names) == 9
    names = [name.decode() for name in listing.names if name != b"\xff\xfe"]
    targets = machine.call("readlinklist", "/odd", names)
    statuses = machine.call("lstatnslist", "/odd", names)
    for name, target, status in zip(names, targets, statuses, strict=True):
        entry = listing.entries[name.encode()]
        assert entry.target.decode() == target
        fields = ("mode", "nlink", "uid", "gid", "size")
        assert [entry.mode, entry.links, entry.uid, entry.gid, entry.size] == [
            status[f"st_{field}"] for field in fields
        ]
    own = machine.call("lstatns", "/odd")
    assert listing.own is not None
    assert (listing.own.mode, listing.own.links) == (own["st_mode"], own["st_nlink"])


@pytest.mark.appliance
def test_directories_are_listed_together_or_not_at_all(machine: RestoredAppliance) -> None:
    """Missing ones, files, links on the way, and what is too large are each None."""
    asked = ["/", "/gone", "/odd/set", "/link", "/out", "/out/self", "/many", "/some", "/empty"]
    root, *nothing, some, empty = machine.list_directories(asked, KNOWN)
    assert root is not None
    assert set(root.names) == {*b"odd empty link out some many lost+found".split()}
    assert nothing == [None] * 6
    assert some == Listing(names=some.names if some else ())
    assert some is not None
    assert len(some.names) == KNOWN + 1
    assert empty is not None
    assert empty.names == ()
    assert empty.own is not None


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


ENTRY = struct.Struct("=5IQ")


def answer(*parts: tuple[int, bytes]) -> bytes:
    """Return an answer of the attendant."""
    return b"".join(struct.pack("=II", number, len(data)) + data for number, data in parts)


def test_an_answer_is_read_as_it_was_written() -> None:
    """With descriptions, without, and for a directory that could not be read."""
    link, own = ENTRY.pack(0o120777, 1, 2, 3, 4, 5), ENTRY.pack(0o40755, 2, 0, 0, 0, 4096)
    described = b"a\0b\0\0" + link + b"to/a" + ENTRY.pack(0, 0, 0, 0, 0, 0) + own
    assert parse_listings(answer((0, described), (2, b""), (0, b"c\0\0"), (0, b"\0" + own))) == [
        Listing(
            names=(b"a", b"b"),
            own=Described(mode=0o40755, links=2, uid=0, gid=0, size=4096),
            entries={b"a": Described(mode=0o120777, links=1, uid=2, gid=3, size=5, target=b"to/a")},
        ),
        None,
        Listing(names=(b"c",)),
        Listing(names=(), own=Described(mode=0o40755, links=2, uid=0, gid=0, size=4096)),
    ]


def test_a_damaged_answer_is_an_error() -> None:
    """A guest that has taken over the appliance can make nothing worse of it."""
    random_bytes = random.Random(5)
    own = ENTRY.pack(0o40755, 2, 0, 0, 0, 4096)
    good = answer((0, b"a\0b\0\0" + own * 3), (2, b""), (0, b"c\0\0"))
    refused = 0
    for _ in range(3000):
        bad = bytearray(good[: random_bytes.randrange(1, len(good) + 1)])
        for _ in range(random_bytes.randrange(4)):
            bad[random_bytes.randrange(len(bad))] = random_bytes.randrange(256)
        with contextlib.suppress(ApplianceError):
            parse_listings(bytes(bad))
            continue
        refused += 1
    assert refused > 1000
