"""A guest on several disks: killed at any moment, all of its images are finished or none is."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

import vmprovision
from tests.image.stacks import Stack, build_stack
from vmprovision.errors import ImageError, ImageRecoveryError
from vmprovision.image import redolog
from vmprovision.image.chain import run_qemu_img, source
from vmprovision.image.imageset import commit_images, open_images
from vmprovision.image.recovery import recover_image
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.image.conftest import Refuse

MB = 1 << 20
OLD, NEW = b"o" * MB, b"\x55" * MB
KILLED = 9
# A root and a /usr on a disk each, of one volume group.
TWO_DISKS = Stack(
    script="""
lvm pvcreate -q $A $B; lvm vgcreate -q vg $A $B
lvm lvcreate -q -y -L 40M -n root vg $A; lvm lvcreate -q -y -L 40M -n usr vg $B
mke2fs -q -t ext4 /dev/vg/root; mke2fs -q -t ext4 /dev/vg/usr
mount /dev/vg/root /sysroot; mkdir /sysroot/usr; mount /dev/vg/usr /sysroot/usr
guest <<END
/dev/mapper/vg-root / ext4 defaults 0 1
/dev/mapper/vg-usr /usr ext4 defaults 0 2
END
""",
    sizes_mb=(64, 64),
    files={"/usr/share/doc": None},
)


@pytest.fixture
def disks(tmp_path: Path) -> dict[Path, str]:
    """Make three raw disks; return them with their format."""
    paths = [tmp_path / f"disk{number}.raw" for number in range(3)]
    for path in paths:
        path.write_bytes(OLD)
    return dict.fromkeys(paths, "raw")


def change(disks: dict[Path, str], numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    """Write to some of the disks, as an appliance does, and commit."""
    control = Control()
    with open_images(disks, write=True, control=control) as images:
        for number in numbers:
            layer = images[number].layer
            command = ["qemu-io", "-c", f"write -q -P 0x55 0 {MB}", source(layer)]
            handles = [file.handle for file in layer.files()]
            subprocess.run(command, pass_fds=handles, check=True, capture_output=True)
        commit_images(images, control)


def in_child(work: Callable[[], None]) -> int:
    """Do this in a child process; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killer:
    """Counts the steps of a commit and ends the process at one of them, as SIGKILL would."""

    def __init__(self, deadly: int | None) -> None:
        """Kill at this step, counted from 0, or never."""
        self.steps = 0
        self._deadly = deadly

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, with a step before and one after it."""

        def stepped(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 -- as the call
            self._step()
            result = call(*arguments, **options)
            self._step()
            return result

        return stepped

    def half_merged(self, words: list[str], *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 -- as run_qemu_img
        """Do as ``run_qemu_img``, with a step at which a merge has written half."""
        if words[0] == "commit" and self.steps == self._deadly:
            overlay = arguments[0][0]
            path = overlay.backing.file.path
            path.write_bytes(NEW[: MB // 2] + path.read_bytes()[MB // 2 :])
        return self.around(run_qemu_img)(words, *arguments, **options)

    def _step(self) -> None:
        if self.steps == self._deadly:
            os._exit(KILLED)
        self.steps += 1


def committed(disks: dict[Path, str], deadly: int | None) -> int:
    """Change the disks in a process that is killed at a step; return its exit status."""

    def work() -> None:
        killer = Killer(deadly)
        redolog.os = _Os(killer)  # type: ignore[assignment, attr-defined]
        redolog.run_qemu_img = killer.half_merged  # type: ignore[assignment, attr-defined]
        change(disks)

    return in_child(work)


class _Os:
    """The module os, with steps around what changes a folder."""

    def __init__(self, killer: Killer) -> None:
        self._killer = killer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- as the module has it
        found = getattr(os, name)
        return self._killer.around(found) if name in ("rename", "unlink", "fsync") else found


def contents(disks: dict[Path, str]) -> set[bytes]:
    """Return what is in the disks."""
    return {path.read_bytes() for path in disks}


def test_disks_are_finished_together_or_not_at_all(disks: dict[Path, str]) -> None:
    """After a kill at any step, recovering the first disk leaves no mixture."""
    first = next(iter(disks))
    outcomes = set()
    for deadly in range(200):
        for path in disks:
            path.write_bytes(OLD)
        status = committed(disks, deadly)
        if status == 0:
            break
        assert status == KILLED
        recover_image(first, stated_format="raw", control=Control())
        for path in disks:  # what is left beside the others is nothing's now
            recover_image(path, stated_format="raw", control=Control())
        found = contents(disks)
        assert found in ({OLD}, {NEW}), f"a mixture after step {deadly}"
        outcomes |= found
        assert sorted(first.parent.iterdir()) == sorted(disks)
    else:
        pytest.fail("it never ended")
    assert contents(disks) == {NEW}
    assert outcomes == {OLD, NEW}


def decided_step(disks: dict[Path, str]) -> int:
    """Return the first step from which on the disks are finished."""
    for deadly in range(200):
        committed(disks, deadly)
        if any(path.name.startswith("disk0.raw.vmprovision-sealed") for path in folder_of(disks)):
            return deadly
        for path in folder_of(disks):
            if path not in disks:
                path.unlink()
    pytest.fail("it was never decided")


def folder_of(disks: dict[Path, str]) -> list[Path]:
    """Return all files beside the disks."""
    return sorted(next(iter(disks)).parent.iterdir())


def test_other_disks_say_which_to_recover(disks: dict[Path, str]) -> None:
    """A disk by itself is neither merged nor thrown away while the first one decides."""
    decided_step(disks)
    first, second, _ = disks
    with pytest.raises(ImageRecoveryError) as caught:
        recover_image(second, stated_format="raw", control=Control())
    assert f"recover {first}" in caught.value.hint
    moved = first.rename(first.with_name("moved.raw"))
    with pytest.raises(ImageRecoveryError, match="unknown whether"):
        recover_image(second, stated_format="raw", control=Control())
    moved.rename(first)
    hidden = second.rename(second.with_name("hidden.raw"))
    with pytest.raises(ImageRecoveryError, match=r"disk1\.raw"):
        recover_image(first, stated_format="raw", control=Control())
    assert first.read_bytes() == OLD
    hidden.rename(second)
    assert recover_image(first, stated_format="raw", control=Control()) == "merged"
    assert contents(disks) == {NEW}


def test_a_disk_that_is_not_written_stays_as_it_was(disks: dict[Path, str]) -> None:
    """Of three disks one is written: the others keep even their time."""
    before = {path: path.stat().st_mtime_ns for path in disks}
    change(disks, numbers=(1,))
    first, second, third = disks
    assert second.read_bytes() == NEW
    assert [path.stat().st_mtime_ns for path in (first, third)] == [before[first], before[third]]


def test_a_disk_is_given_once(disks: dict[Path, str], tmp_path: Path) -> None:
    """Another name of the same disk is seen to be it."""
    link = tmp_path / "link.raw"
    link.hardlink_to(next(iter(disks)))

    def open_all() -> NoReturn:
        with open_images({**disks, link: "raw"}, write=True, control=Control()):
            pytest.fail("it was opened")

    with pytest.raises(ImageError, match="twice"):
        open_all()


@pytest.mark.appliance
def test_a_volume_group_on_two_disks(tmp_path: Path, refuse: Refuse) -> None:
    """With both disks the guest is injected; with one it is refused, and --disk is named."""
    first, second = build_stack(tmp_path, TWO_DISKS)
    error = refuse(first, 34)
    assert "vg" in error["message"]
    assert "--disk" in error["hint"]
    source = vmprovision.ImageOptions(disks=(second,))
    before = second.read_bytes()
    report = vmprovision.inject(first, source=source)
    assert report.guest.mountpoints == {"/": "/dev/vg/root", "/usr": "/dev/vg/usr"}
    assert report.as_json()["disks"] == [str(second)]
    assert second.read_bytes() != before
    assert vmprovision.verify(first, source=source).mismatches == ()
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("directory", [True, False])
def test_other_disks_where_there_can_be_none(tmp_path: Path, directory: bool) -> None:  # noqa: FBT001 -- a parameter
    """A directory has no other disks, and --output makes one image only."""
    image = tmp_path / "disk.raw"
    image.write_bytes(OLD)
    source = vmprovision.ImageOptions(disks=(image,))
    target, output = (tmp_path, None) if directory else (image, tmp_path / "new.raw")
    with pytest.raises(vmprovision.PlanError):
        vmprovision.inject(target, source=source, output=output)
    assert image.read_bytes() == OLD
