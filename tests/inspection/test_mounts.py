"""What hides the files of a plan from a running guest, read from trees."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, Link, elf, make_tree
from vmprovision.errors import InspectionError, UnsupportedGuestError
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.mounts import covering_mounts
from vmprovision.mounts.directory import mounted_below
from vmprovision.mounts.units import mountpoint_of, unit_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.trees import Content

LOCAL = PurePosixPath("/usr/local")
UNIT = "/etc/systemd/system/usr-local.mount"
VENDOR = "/usr/lib/systemd/system/usr-local.mount"
MOUNT = "[Unit]\nDescription=x\n[Mount]\nWhat=nas:/local\nWhere=/usr/local\nType=nfs\n"
UPPER = "/etc/systemd/system/a.service"
WANTS = "/etc/systemd/system/remote-fs.target.wants/usr-local.mount"


def found(folder: Path, files: Mapping[str, Content], *watched: str) -> list[tuple[str, str, bool]]:
    """Return the mounts over these directories: source, place, whether mounted at boot."""
    reader = LocalFilesystem(make_tree(folder / "root", {**SYSTEMD_TREE, **files}))
    paths = [PurePosixPath(path) for path in watched or ("/usr/local/bin",)]
    return [(m.source, str(m.place), m.at_boot) for m in covering_mounts(reader, paths)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nas:/local /usr/local nfs defaults 0 0", [("nas:/local", "/usr/local", True)]),
        ("LABEL=a\\040b /usr//local/ ext4", [("LABEL=a b", "/usr/local", True)]),
        ("/dev/vdb1\t/usr/local\text4\tnofail\t0\t0\r", [("/dev/vdb1", "/usr/local", True)]),
        ("/dev/vdb1 /usr/local ext4 noauto", [("/dev/vdb1", "/usr/local", False)]),
        ("/dev/vdb1 /usr ext4 noauto", [("/dev/vdb1", "/usr", True)]),
        (
            "x /usr/local nfs noauto,x-systemd.automount",
            [("x", "/usr/local", True)],
        ),
        ("/dev/vdb1 /opt/../usr/local ext4", [("/dev/vdb1", "/usr/local", True)]),
        ("/dev/vdb1 /alias ext4", [("/dev/vdb1", "/usr/local", True)]),
        ("/usr/local /usr/local none bind,ro", []),
        ("#/dev/vdb1 /usr/local ext4", []),
        ("/dev/vdb1 none swap sw", []),
        ("/dev/vdb1", []),
        ("/dev/vdb1 /usr/locale ext4", []),
        ("/dev/vdb1 / ext4", []),
        ("/dev/vdb1 /circle/x ext4", []),
    ],
)
def test_lines_of_fstab(line: str, expected: list[tuple[str, str, bool]], tmp_path: Path) -> None:
    """Only what is on or above a watched directory counts, links and escapes resolved."""
    files: dict[str, Content] = {
        "/etc/fstab": f"{line}\n",
        "/alias": Link("usr/local"),
        "/circle": Link("/circle"),
    }
    assert found(tmp_path, files) == expected


def test_links_lead_under_a_mount(tmp_path: Path) -> None:
    """Directories that matter are checked at their real paths."""
    files: dict[str, Content] = {"/usr/local/lib": Link("/data/lib")}
    files["/etc/fstab"] = "/dev/vdb1 /data ext4\n"
    assert found(tmp_path, files, "/usr/local/lib/guest-agent") == [("/dev/vdb1", "/data", True)]


def test_a_huge_fstab_is_read_in_linear_time(tmp_path: Path) -> None:
    """Fifty thousand lines are read, one of which matters; the same line twice is one mount."""
    lines = [f"UUID={number} /mnt/{number} ext4 defaults 0 2\n" for number in range(50_000)]
    text = "".join([*lines, *["/dev/vdb1 /usr/local ext4\n"] * 1000])
    assert found(tmp_path, {"/etc/fstab": text}) == [("/dev/vdb1", "/usr/local", True)]


def test_an_fstab_without_end_is_refused(tmp_path: Path) -> None:
    """More than any real one holds is one error that names the file."""
    with pytest.raises(InspectionError, match="/etc/fstab"):
        found(tmp_path, {"/etc/fstab": "#" * (5 << 20)})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({UNIT: MOUNT, WANTS: Link(UNIT)}, ["nas:/local"]),
        ({VENDOR: MOUNT, WANTS: Link(VENDOR)}, ["nas:/local"]),
        ({UNIT: MOUNT}, []),
        ({UNIT: MOUNT, UPPER: "[Unit]\nRequires=usr-local.mount\n"}, ["nas:/local"]),
        (
            {UNIT: MOUNT, UPPER: "[Unit]\nRequiresMountsFor=/usr/local/x\n"},
            ["nas:/local"],
        ),
        (
            {
                UNIT: MOUNT,
                "/etc/systemd/system/usr-local.automount": "[Automount]\nWhere=/usr/local\n",
                WANTS.replace(".mount", ".automount"): Link("../usr-local.automount"),
            },
            ["nas:/local"],
        ),
        (
            {UNIT: MOUNT, WANTS: Link(UNIT), f"{UNIT}.d/x.conf": "[Mount]\nWhat=/dev/vdb1\n"},
            ["/dev/vdb1"],
        ),
        ({UNIT: Link("/dev/null"), "/etc/fstab": "/dev/vdb1 /usr/local ext4\n"}, []),
        ({UNIT: MOUNT, "/etc/fstab": "/dev/vdb1 /usr/local ext4\n"}, ["nas:/local"]),
        ({VENDOR: MOUNT, "/etc/fstab": "/dev/vdb1 /usr/local ext4\n"}, ["/dev/vdb1"]),
        (
            {UNIT: MOUNT, WANTS: Link(UNIT), "/usr/lib/systemd/systemd": "", "/sbin": None},
            ["nas:/local"],
        ),
    ],
)
def test_units_of_systemd(
    files: Mapping[str, Content], expected: list[str], tmp_path: Path
) -> None:
    """A mount unit counts where something starts it; the administrator's goes before fstab."""
    assert [source for source, _, _ in found(tmp_path, files)] == expected


def test_units_do_not_count_without_systemd(tmp_path: Path) -> None:
    """Another init system does not read them."""
    root = make_tree(tmp_path, {"/bin/sh": elf(), UNIT: MOUNT, WANTS: Link(UNIT)})
    assert covering_mounts(LocalFilesystem(root), [LOCAL]) == ()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("usr-local.mount", "/usr/local"),
        ("-.mount", "/"),
        ("srv-a\\x2db.mount", "/srv/a-b"),
        ("srv-\\x2ehidden.mount", "/srv/.hidden"),
    ],
)
def test_names_of_units(name: str, path: str) -> None:
    """They are escaped as systemd-escape(1) does it, and back."""
    assert mountpoint_of(name) == PurePosixPath(path)
    assert unit_name(PurePosixPath(path)) == name


def test_the_automounter(tmp_path: Path) -> None:
    """Its indirect and direct maps cover directories, where it is installed."""
    files: dict[str, Content] = {
        "/etc/auto.master": "# x\n/- /etc/auto.direct --timeout=60\n/opt auto.opt\n",
        "/etc/auto.direct": "/usr/local -fstype=nfs,rw nas:/local\n",
    }
    assert found(tmp_path / "without", files, "/usr/local", "/opt") == []
    files["/usr/sbin/automount"] = elf()
    expected = [("auto.opt", "/opt", True), ("nas:/local", "/usr/local", True)]
    assert found(tmp_path / "with", files, "/usr/local", "/opt") == expected


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"/etc/fstab": "/data /usr/local none bind 0 0\n"}, "/data on /usr/local (line 1 of"),
        ({"/etc/fstab": "nas:/l /usr nfs 0 0\n"}, "nas:/l on /usr (line 1 of"),
        ({"/etc/fstab": "tmpfs /etc tmpfs 0 0\n"}, "a tmpfs is empty"),
        ({"/etc/fstab": "x\\033[2Jy /etc overlay 0 0\n"}, "x\\x1b[2Jy on /etc"),
        (
            {
                "/etc/fstab": "/dev/vdb1 /empty ext4\n",
                "/empty": None,
                "/usr/local/lib": Link("/empty"),
            },
            "/empty",
        ),
        ({UNIT: MOUNT, WANTS: Link(UNIT)}, f"(the unit {UNIT})"),
        ({"/usr/local/lib": Link("/run/local")}, "/run is empty"),
    ],
)
def test_a_plan_below_a_mount_is_refused(
    files: Mapping[str, Content], says: str, tmp_path: Path
) -> None:
    """One error names the path, the mountpoint, the source, where it is declared, the next step."""
    root = make_tree(tmp_path / "root", {**SYSTEMD_TREE, **files})
    with pytest.raises(UnsupportedGuestError, match="would be hidden") as refusal:
        vmprovision.plan(root)
    assert says in refusal.value.message
    assert refusal.value.hint
    assert "/run" in says or any("on /" in note for note in vmprovision.inspect(root).notes)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/dev/vdb1 /usr ext4 defaults 0 2", ["taken for that filesystem"]),
        ("/dev/vdb1 /usr/local ext4 noauto 0 2", ["noauto"]),
        ("tmpfs /var/log tmpfs", ["tmpfs"]),
        ("tmpfs /tmp tmpfs", []),
    ],
)
def test_a_plan_beside_a_mount_is_made(line: str, expected: list[str], tmp_path: Path) -> None:
    """A tree that holds what is to be mounted, and what hides nothing, give a note at most."""
    root = make_tree(tmp_path / "root", {**SYSTEMD_TREE, "/etc/fstab": f"{line}\n"})
    notes = vmprovision.plan(root).guest.notes
    assert len(notes) == len(expected)
    assert all(word in note for word, note in zip(expected, notes, strict=True))


def test_notes_are_few_and_short(tmp_path: Path) -> None:
    """However many mounts cover what is watched, and however long their names are."""
    names = [*map(str, range(2999)), "x" * 1000]
    lines = [f"nas:/{name} /var/log nfs\n" for name in reversed(names)]
    root = make_tree(tmp_path / "root", {**SYSTEMD_TREE, "/etc/fstab": "".join(lines)})
    notes = vmprovision.inspect(root).notes
    assert len(notes) <= 21
    assert max(len(note) for note in notes) <= 300
    assert "2980 more" in notes[-1]


def test_mounts_of_this_host_are_seen() -> None:
    """``/proc`` is mounted wherever this runs."""
    assert PurePosixPath("/proc") in mounted_below(Path("/"))
