"""One contract, unchanged, over a directory of the host and over a guest in an appliance."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.session import Drive, launch, open_appliance
from vmprovision.errors import ApplyError, GuestSpaceError, InspectionError
from vmprovision.filesystem import inroot
from vmprovision.filesystem.deployment import DeployedFilesystem, disk_path
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.filesystem.protocol import (
    Attributes,
    GuestFilesystem,
    read_text,
    resolve,
    status_of,
)
from vmprovision.host.command import run
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

P = PurePosixPath
DISK_SIZE = "64M"


@pytest.fixture(scope="module")
def appliance_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApplianceFilesystem]:
    """Return an empty ext4 filesystem, mounted in a stock appliance that the tests share."""
    with _mounted(launch, tmp_path_factory.mktemp("stock")) as filesystem:
        yield filesystem


@pytest.fixture(scope="module")
def restored_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApplianceFilesystem]:
    """Return the same in a restored appliance."""
    with _mounted(open_appliance, tmp_path_factory.mktemp("restored")) as filesystem:
        appliance = filesystem._appliance  # noqa: SLF001 -- to see which it is
        require(not appliance.has_volumes, "no appliance can be restored here")
        yield filesystem


@contextlib.contextmanager
def _mounted(opener: Callable[..., Any], folder: Path) -> Iterator[ApplianceFilesystem]:
    disks = [folder / "disk.qcow2", folder / "another.qcow2"]
    for disk in disks:
        run(["qemu-img", "create", "-q", "-f", "qcow2", disk, DISK_SIZE], timeout=60)
    drives = [Drive(path=disk, format="qcow2") for disk in disks]
    with opener(drives, control=Control()) as appliance:
        appliance.call("mkfs", "ext4", "/dev/sda")
        appliance.call("mount", "/dev/sda", "/")
        yield ApplianceFilesystem(appliance)
        appliance.call("umount_all")


@pytest.fixture(
    params=[
        *("local", "walk", "deployed"),
        pytest.param("appliance", marks=pytest.mark.appliance),
        pytest.param("restored", marks=pytest.mark.appliance),
    ]
)
def guest(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[GuestFilesystem, PurePosixPath]]:
    """Return a filesystem and an empty directory in it; links resolve in the guest's root."""
    if request.param in ("local", "walk"):
        if request.param == "walk":  # an older kernel
            monkeypatch.setattr(inroot, "_openat2", _not_implemented)
        (tmp_path / "work").mkdir()
        yield LocalFilesystem(tmp_path), P("/work")
        return
    if request.param == "deployed":
        deployment, state = P("/ostree/deploy/os/deploy/0.0"), P("/ostree/deploy/os/var")
        for path in (deployment, state / "work"):
            (tmp_path / path.relative_to("/")).mkdir(parents=True)
        yield DeployedFilesystem(LocalFilesystem(tmp_path), deployment, state), P("/var/work")
        return
    filesystem: ApplianceFilesystem = request.getfixturevalue(f"{request.param}_guest")
    work = P("/") / request.node.name.split("[")[0]
    filesystem.make_directory(work)
    yield filesystem, work


def _not_implemented(*_arguments: object) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


Guest = tuple[GuestFilesystem, PurePosixPath]


def test_absence_is_a_value(guest: Guest) -> None:
    """Nothing there, and nothing there below a file, is None and an empty list."""
    filesystem, work = guest
    filesystem.write(work / "file", b"x")
    assert filesystem.lstat(work / "gone") is None
    assert filesystem.lstat(work / "file" / "below") is None
    assert filesystem.list_directory(work / "gone") == []


def test_a_file_is_what_was_written(guest: Guest) -> None:
    """Content, mode, owner and size, also for a file of more than one message."""
    filesystem, work = guest
    content = bytes(range(256)) * 20000
    path = work / "file"
    filesystem.write(path, content, Attributes(mode=0o4750))
    status = filesystem.lstat(path)
    assert status is not None
    assert (status.kind, status.mode, status.uid, status.gid) == ("file", 0o4750, 0, 0)
    assert status.size == len(content)
    assert filesystem.read(path, limit=len(content) + 1) == content
    assert filesystem.read(path, limit=5, offset=1000) == content[1000:1005]


def test_writing_again_leaves_nothing_of_the_old_content(guest: Guest) -> None:
    """A shorter content, and none at all; the mode is the one that was asked for."""
    filesystem, work = guest
    path = work / "file"
    filesystem.write(path, b"long content")
    filesystem.write(path, b"short")
    assert filesystem.read(path, limit=100) == b"short"
    filesystem.write(path, b"", Attributes(mode=0o640))
    assert filesystem.read(path, limit=100) == b""
    status = filesystem.lstat(path)
    assert status is not None
    assert status.mode == 0o640


def test_links_are_kept_as_written(guest: Guest) -> None:
    """A link is a link, whatever it leads to; its target is not touched by lstat or remove."""
    filesystem, work = guest
    filesystem.symlink(work / "link", "/no/such place")
    status = filesystem.lstat(work / "link")
    assert status is not None
    assert status.kind == "symlink"
    assert filesystem.readlink(work / "link") == "/no/such place"
    filesystem.remove(work / "link")
    assert filesystem.lstat(work / "link") is None


def test_links_in_the_middle_are_followed_inside_the_guest(guest: Guest) -> None:
    """Absolute and relative, with more dots than there are directories."""
    filesystem, work = guest
    filesystem.make_directory(work / "real")
    filesystem.write(work / "real" / "file", b"here")
    dots = "../" * 30
    for name, target in (
        ("absolute", f"{work}/real"),
        ("relative", "real"),
        ("dots", f"{dots}{str(work)[1:]}/real"),
    ):
        filesystem.symlink(work / name, target)
        assert filesystem.read(work / name / "file", limit=10) == b"here"
        assert resolve(filesystem, work / name / "file") == work / "real" / "file"
        assert filesystem.list_directory(work / name) == ["file"]


def test_a_write_never_follows_the_last_link(guest: Guest) -> None:
    """A guest's link cannot direct what we write somewhere else."""
    filesystem, work = guest
    filesystem.write(work / "victim", b"precious")
    filesystem.symlink(work / "link", f"{work}/victim")
    filesystem.write(work / "link", b"ours")
    assert filesystem.read(work / "link", limit=100) == b"ours"
    assert filesystem.read(work / "victim", limit=100) == b"precious"


def test_a_directory_gives_way_to_nothing(guest: Guest) -> None:
    """Neither to a file, a link nor another directory."""
    filesystem, work = guest
    filesystem.make_directory(work / "folder", Attributes(mode=0o2750))
    with pytest.raises(ApplyError, match="/folder"):
        filesystem.write(work / "folder", b"")
    with pytest.raises(ApplyError, match="/folder"):
        filesystem.symlink(work / "folder", "elsewhere")
    with pytest.raises(ApplyError, match="/folder"):
        filesystem.make_directory(work / "folder")
    status = filesystem.lstat(work / "folder")
    assert status is not None
    assert (status.kind, status.mode) == ("directory", 0o2750)
    assert filesystem.list_directory(work) == ["folder"]


def test_a_circle_of_links_ends(guest: Guest) -> None:
    """Nothing is there, and what is read all the same is an error that names the path."""
    filesystem, work = guest
    filesystem.symlink(work / "a", "b")
    filesystem.symlink(work / "b", "a")
    assert filesystem.lstat(work / "a" / "below") is None
    assert filesystem.list_directory(work / "a") == []
    assert status_of(filesystem, work / "a") is None
    assert read_text(filesystem, work / "b" / "below") is None
    with pytest.raises(InspectionError, match="circle"):
        filesystem.read(work / "a", limit=1)


def test_reading_what_is_no_file_is_an_error(guest: Guest) -> None:
    """A directory is named; nothing blocks."""
    filesystem, work = guest
    with pytest.raises(InspectionError, match=str(work)):
        filesystem.read(work, limit=1)


def test_directories_are_made_and_removed_when_empty(guest: Guest) -> None:
    """One that is not empty is not removed, and the error names it."""
    filesystem, work = guest
    filesystem.make_directory(work / "folder")
    filesystem.write(work / "folder" / "file", b"")
    with pytest.raises(ApplyError, match="folder"):
        filesystem.remove(work / "folder")
    filesystem.remove(work / "folder" / "file")
    filesystem.remove(work / "folder")
    assert filesystem.lstat(work / "folder") is None


def test_a_missing_parent_is_an_error_that_names_the_path(guest: Guest) -> None:
    """Nothing is made that was not asked for."""
    filesystem, work = guest
    with pytest.raises(ApplyError, match="/gone/file"):
        filesystem.write(work / "gone" / "file", b"")
    with pytest.raises(ApplyError, match="/gone/folder"):
        filesystem.make_directory(work / "gone" / "folder")


def test_a_change_is_seen_by_every_name(guest: Guest) -> None:
    """A change of a path clears its cached status, under any spelling of the path."""
    filesystem, work = guest
    filesystem.make_directory(work / "real")
    filesystem.symlink(work / "alias", "real")
    names = (
        work / "real" / "file",
        work / "alias" / "file",
        work / "real" / ".." / "alias" / "file",
    )
    for path in names:
        assert filesystem.lstat(path) is None
    assert filesystem.list_directory(work / "alias") == []
    filesystem.write(work / "alias" / "file", b"one")
    for path in names:
        assert filesystem.read(path, limit=10) == b"one"
    filesystem.write(work / "real" / "file", b"three", Attributes(mode=0o640))
    for path in names:
        status = filesystem.lstat(path)
        assert status is not None
        assert (status.mode, status.size) == (0o640, 5)
        assert filesystem.read(path, limit=10) == b"three"
    filesystem.remove(work / "alias" / "file")
    for path in names:
        assert filesystem.lstat(path) is None
    filesystem.remove(work / "alias")
    filesystem.symlink(work / "alias", "elsewhere")
    assert filesystem.readlink(work / "alias") == "elsewhere"
    assert filesystem.list_directory(work / "alias") == []
    assert filesystem.list_directory(work) == ["alias", "real"]


def test_a_file_has_other_names_that_keep_its_content(guest: Guest, tmp_path: Path) -> None:
    """A written file is a new file, and a removal affects only one name."""
    filesystem, work = guest
    filesystem.write(work / "one", b"first", Attributes(mode=0o600))
    if not isinstance(filesystem, ApplianceFilesystem):
        folder = tmp_path / disk_path(filesystem, work).relative_to("/")
        (folder / "other").hardlink_to(folder / "one")
    else:
        appliance = filesystem._appliance  # noqa: SLF001 -- to make another name
        appliance.call("ln", str(work / "one"), str(work / "other"))
        filesystem = ApplianceFilesystem(appliance)
    status = filesystem.lstat(work / "one")
    assert status is not None
    assert status.links == 2
    filesystem.write(work / "one", b"second", Attributes(uid=12, gid=34))
    assert filesystem.load(work / "one", limit=9)[1] == b"second"
    status, content = filesystem.load(work / "other", limit=9)
    assert (content, status.mode, status.uid, status.links) == (b"first", 0o600, 0, 1)
    filesystem.remove(work / "one")
    assert filesystem.read(work / "other", limit=9) == b"first"


def test_a_path_of_many_components_takes_no_time(guest: Guest) -> None:
    """Each is asked for once, and none below what is not there."""
    filesystem, work = guest
    deep = P(f"{work}/{'a/' * 1900}file")
    began = time.thread_time()
    assert filesystem.lstat(deep) is None
    assert resolve(filesystem, deep) == deep
    real = work
    for _ in range(40):
        real /= "d"
        filesystem.make_directory(real)
    filesystem.write(real / "file", b"deep")
    assert filesystem.read(real / "file", limit=9) == b"deep"
    assert resolve(filesystem, real / "file") == real / "file"
    assert time.thread_time() - began < 5


def test_what_follows_from_the_root_stays_in_it(guest: Guest) -> None:
    """The root's parent is the root."""
    filesystem, work = guest
    assert filesystem.lstat(P("/..")) == filesystem.lstat(P("/"))
    assert filesystem.lstat(P("/../..") / work.relative_to("/")) == filesystem.lstat(work)
    assert filesystem.list_directory(P("/..")) == filesystem.list_directory(P("/"))


@pytest.mark.appliance
def test_nothing_is_asked_twice(
    appliance_guest: ApplianceFilesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is there nor what is not."""
    appliance = appliance_guest._appliance  # noqa: SLF001 -- to count its calls
    appliance_guest.make_directory(P("/asked"))
    appliance_guest.write(P("/asked/file"), b"content")
    guest = ApplianceFilesystem(appliance)
    names = [P("/asked/file"), P("/asked/gone"), P("/asked/gone/below"), P("/asked/file/below")]
    before = [guest.lstat(path) for path in names], guest.read(names[0], limit=9)
    monkeypatch.setattr(appliance, "call", None)
    assert ([guest.lstat(path) for path in names], guest.read(names[0], limit=9)) == before
    assert guest.read(names[0], limit=3, offset=2) == b"nte"
    assert guest.list_directory(P("/asked")) == ["file"]


@pytest.mark.appliance
def test_a_large_directory_is_not_listed_for_one_name(
    appliance_guest: ApplianceFilesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's directory may hold more names than a message of libguestfs."""
    appliance = appliance_guest._appliance  # noqa: SLF001 -- to see its calls
    appliance_guest.make_directory(P("/many"))
    fill = "cd /sysroot/many && seq -f %0200.0f 400 | xargs touch"
    appliance.call("debug", "sh", [fill])
    guest = ApplianceFilesystem(appliance)
    ask = appliance.call
    calls: list[tuple[object, ...]] = []

    def listen(name: str, *arguments: Any, **options: Any) -> object:  # noqa: ANN401 -- as call has it
        calls.append((name, *arguments))
        return ask(name, *arguments, **options)

    monkeypatch.setattr(appliance, "call", listen)
    assert guest.lstat(P("/many/gone")) is None
    assert guest.lstat(P("/many") / f"{7:0200}") is not None
    assert ("readdir", "/many") not in calls
    assert len(guest.list_directory(P("/many"))) == 400


@pytest.mark.appliance
def test_names_without_regard_to_case(appliance_guest: ApplianceFilesystem) -> None:
    """FAT finds a file by its name in other letters, as an EFI system partition is used."""
    appliance = appliance_guest._appliance  # noqa: SLF001 -- to mount something else for a moment
    appliance.call("umount_all")
    try:
        appliance.call("mkfs", "vfat", "/dev/sdb")
        appliance.call("mount", "/dev/sdb", "/")
        guest = ApplianceFilesystem(appliance)
        guest.make_directory(P("/efi"))
        guest.write(P("/efi/BootX64.efi"), b"MZ")
        guest = ApplianceFilesystem(appliance)
        assert guest.read(P("/EFI/BOOTX64.EFI"), limit=9) == b"MZ"
        assert guest.lstat(P("/EFI/BOOTAA64.EFI")) is None
    finally:
        appliance.call("umount_all")
        appliance.call("mount", "/dev/sda", "/")


@pytest.mark.appliance
def test_names_that_are_no_utf8_are_left_out(appliance_guest: ApplianceFilesystem) -> None:
    """The binding decodes strictly; a hostile name must not stop inspection."""
    appliance = appliance_guest._appliance  # noqa: SLF001 -- to make a name that str cannot hold
    appliance_guest.make_directory(P("/names"))
    appliance_guest.write(P("/names/good"), b"")
    appliance.call("debug", "sh", ["touch \"$(printf '/sysroot/names/bad\\377')\""])
    with pytest.raises(UnicodeDecodeError):
        appliance.call("ls", "/names")
    assert appliance_guest.list_directory(P("/names")) == ["good"]


@pytest.mark.appliance
def test_labels_of_files_and_links_round_trip(appliance_guest: ApplianceFilesystem) -> None:
    """An SELinux label is written and read, on a link too."""
    label = "system_u:object_r:bin_t:s0"
    appliance_guest.write(P("/labelled"), b"")
    appliance_guest.symlink(P("/labelled-link"), "/labelled")
    for path in (P("/labelled"), P("/labelled-link")):
        assert appliance_guest.label(path) is None
        appliance_guest.set_label(path, label)
        assert appliance_guest.label(path) == label


@pytest.mark.appliance
def test_filesystems_say_whether_they_take_labels(appliance_guest: ApplianceFilesystem) -> None:
    """One of Linux's own does; FAT has no place for them."""
    assert appliance_guest.takes_labels()
    appliance = appliance_guest._appliance  # noqa: SLF001 -- to mount something else for a moment
    appliance.call("umount_all")
    try:
        appliance.call("mkfs", "vfat", "/dev/sdb")
        appliance.call("mount", "/dev/sdb", "/")
        assert not appliance_guest.takes_labels()
    finally:
        appliance.call("umount_all")
        appliance.call("mount", "/dev/sda", "/")


@pytest.mark.appliance
def test_a_full_filesystem_is_its_own_error(appliance_guest: ApplianceFilesystem) -> None:
    """It says what to do."""
    with pytest.raises(GuestSpaceError, match="/big") as caught:
        appliance_guest.write(P("/big"), bytes(70 << 20))
    assert caught.value.hint
    appliance_guest.remove(P("/big"))


@pytest.mark.appliance
@pytest.mark.parametrize("kind", ["appliance", "restored"])
def test_a_link_says_why_it_cannot_be_made(request: pytest.FixtureRequest, kind: str) -> None:
    """Its folder is missing, or the filesystem is read-only; each is its own error."""
    guest: ApplianceFilesystem = request.getfixturevalue(f"{kind}_guest")
    appliance = guest._appliance  # noqa: SLF001 -- to mount it read-only for a moment
    with pytest.raises(ApplyError, match=r"/gone/link.*No such file"):
        guest.symlink(P("/gone/link"), "/target")
    appliance.unmount()
    appliance.call("mount_ro", "/dev/sda", "/")
    try:
        with pytest.raises(GuestSpaceError, match=r"read-only.*/link"):
            ApplianceFilesystem(appliance).symlink(P("/link"), "/target")
    finally:
        appliance.unmount()
        appliance.call("mount", "/dev/sda", "/")
