"""What is measured beyond the specification: exact figures from the files of several kernels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vmprovision.agent import compat, exposition, files, jsonio, kernel, metrics

HERE = Path(__file__).parent
MODERN, OLD, ODD = (str(HERE / f"proc-{name}") for name in ("6.1", "2.6.18", "odd"))


def figures(proc: str, root: str = "/nowhere") -> dict[str, Any]:
    """What `GET /metrics` answers."""
    measured = metrics.Metrics(proc, root, lambda: 0.0)
    measured.tick(0.0)
    answer: dict[str, Any] = json.loads(jsonio.dumps(measured.read()))
    return answer


def test_a_modern_kernel() -> None:
    """Processors, disks, interfaces, swap, load and pressure, each from its own file."""
    found = figures(MODERN)
    assert found["cpus"] == {"cpu0": 13.9, "cpu1": 14.3}
    assert (found["load_average_5"], found["load_average_15"]) == (0.5, 0.25)
    assert (found["swap_total_kb"], found["swap_used_kb"]) == (1048572, 572)
    assert set(found["disks"]) == {"vda", "nvme0n1", "mmcblk0", "dm-0"}
    assert found["disks"]["vda"] == {
        "reads": 78956,
        "read_bytes": 5693050 * 512,
        "read_ms": 41972,
        "writes": 144307,
        "written_bytes": 16702528 * 512,
        "write_ms": 85418,
        "in_progress": 1,
        "busy_ms": 22528,
    }
    assert found["networks"]["eth0"] == {
        "receive_bytes": 816689150,
        "receive_packets": 18929,
        "receive_errors": 1,
        "receive_dropped": 2,
        "transmit_bytes": 1140561,
        "transmit_packets": 10970,
        "transmit_errors": 7,
        "transmit_dropped": 8,
    }
    assert set(found["pressure"]) == {"cpu", "io"}
    assert found["pressure"]["io"]["full"] == {
        "avg10": 0.43,
        "avg60": 0.27,
        "avg300": 0.36,
        "total_us": 7166497,
    }


def test_linux_2_6_18() -> None:
    """Partitions have short lines there, large counters stand at the colon, no mountinfo."""
    found = figures(OLD)
    assert set(found["disks"]) == {"hda", "hdc", "dm-0"}
    assert found["disks"]["hda"]["written_bytes"] == 89656 * 512
    assert found["networks"]["eth0"]["receive_bytes"] == 1234567890
    assert found["networks"]["eth0"]["transmit_packets"] == 55555
    assert found["pressure"] is None
    mounts = [each[:4] for each in kernel.file_systems(OLD, "/nowhere")]
    assert mounts == [("/dev/root", "/", "ext3", False), ("/dev/hda1", "/boot", "ext3", True)]


def test_files_that_are_not_as_they_should_be() -> None:
    """Lines that make no sense are passed over, and what is left of a figure is null."""
    found = figures(ODD)
    assert set(found["disks"]) == {"sdc"}
    assert set(found["networks"]) == {'q"\\'}
    for name in ("cpu_usage_percent", "cpus", "load_average", "memory_total_kb", "pressure"):
        assert found[name] is None
    assert found["swap_total_kb"] == 7
    text = b"".join(exposition.render(ODD, "/nowhere", None)).decode()
    assert 'node_network_receive_bytes_total{device="q\\"\\\\"} 1\n' in text
    assert "node_load" not in text


def test_only_local_file_systems_are_asked() -> None:
    """None on a network, none below a network's, FUSE's or the automounter's mount point."""
    found = [(point, read_only) for _, point, _, read_only, _ in kernel.file_systems(MODERN, "")]
    assert dict(found) == {
        "/": False,
        "/srv/with space": True,
        "/run": False,
        "/mnt/farther": False,
    }


def test_file_systems_of_this_host() -> None:
    """Sizes are those that statvfs tells, in kibibytes."""
    found = figures("/proc", "")["file_systems"]
    roots = [each for each in found or [] if each["mountpoint"] == "/"]
    if not roots:
        pytest.skip("the root of this host is no local file system")
    root = roots[0]
    told = os.statvfs("/")
    assert root["total_kb"] == told.f_frsize * told.f_blocks // 1024
    assert abs(root["available_kb"] - told.f_frsize * told.f_bavail // 1024) < 1 << 20


def test_too_many_mounts_are_none(tmp_path: Path) -> None:
    """Where not all mounts are known, none is asked: the next could be one that hangs."""
    (tmp_path / "self").mkdir()
    line = "%d 1 254:1 / /m%d rw - ext4 /dev/vda1 rw\n"
    table = tmp_path / "self" / "mountinfo"
    table.write_text("".join(line % (number, number) for number in range(compat.ROW_LIMIT + 1)))
    assert list(kernel.file_systems(str(tmp_path), "")) == []
    table.write_text("".join(line % (number, number) for number in range(100)))
    assert len(list(kernel.file_systems(str(tmp_path), ""))) == 100


def test_huge_files_are_read_in_part(tmp_path: Path) -> None:
    """Endless lines and endless files take neither memory nor time without bound."""
    (tmp_path / "stat").write_text("cpu 1 0 1 2\nintr 7 " + "0 " * 100000 + "\nctxt 5\n")
    lines = list(files.read_lines(str(tmp_path / "stat")))
    assert [line[:7] for line in lines] == [b"cpu 1 0", b"intr 7 ", b"ctxt 5"]
    assert len(lines[1]) == files.LINE_LIMIT
    (tmp_path / "stat").write_text("cpu 1 0 1 2\n" + "x" * 10000000)
    assert list(files.read_lines(str(tmp_path / "stat"))) == [b"cpu 1 0 1 2"]
    (tmp_path / "diskstats").write_text(f"8 0 sd{'x' * 30} {'1 ' * 11}\n" * 200000)
    (tmp_path / "net").mkdir()
    device = "eth%d: " + "1 " * 16 + "\n"
    (tmp_path / "net/dev").write_text("".join(device % number for number in range(100000)))
    (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n" + "X: 1 kB\n" * 1000000)
    found = figures(str(tmp_path))
    assert found["cpu_usage_percent"] == 50.0
    assert found["memory_total_kb"] == 5
    assert len(found["networks"]) == metrics.LIST_LIMIT
    for piece in exposition.render(str(tmp_path), "/nowhere", None):
        assert len(piece) < 4 * exposition.PIECE_SIZE


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 2047, 2048, 5000])
def test_lines_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    """However lines lie across the pieces that are read, short ones come whole."""
    text = "".join(f"{number:0{1 + number % 37}d}\n" for number in range(size))
    path = tmp_path / "file"
    for content in (text, text.rstrip("\n")):
        path.write_text(content)
        expected = [line.encode() for line in content.splitlines()]
        assert list(files.read_lines(str(path), 1 << 30)) == expected
    assert list(files.read_lines(str(tmp_path / "none"))) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sda", True),
        ("sda1", False),
        ("sdaa12", False),
        ("hdc", True),
        ("vdb3", False),
        ("xvda1", False),
        ("nvme0n1", True),
        ("nvme0n1p2", False),
        ("mmcblk0", True),
        ("dm-0", True),
        ("md127", True),
        ("loop3", False),
        ("ram0", False),
        ("zram0", True),
        ("sr0", True),
    ],
)
def test_disks_and_partitions(name: str, expected: bool) -> None:  # noqa: FBT001 -- a case
    """Partitions count in their disk; loop devices and RAM disks are none."""
    assert kernel.is_disk(name) is expected


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"etc/os-release": 'ID=debian\nPRETTY_NAME="Deb 12"\n# X=1\n'}, ("debian", "Deb 12")),
        ({"usr/lib/os-release": "ID='arch'\nPRETTY_NAME=Arch\n"}, ("arch", "Arch")),
        ({"etc/redhat-release": "CentOS release 6.10\n"}, ("redhat", "CentOS release 6.10")),
        ({"etc/slackware-version": "Slackware 14.2\n"}, ("slackware", "Slackware 14.2")),
        ({"etc/SuSE-release": "SUSE 11\nVERSION = 11\n"}, ("suse", "SUSE 11")),
        ({"etc/debian_version": "6.0.10\n"}, ("debian", None)),
        ({}, (None, None)),
    ],
)
def test_the_operating_system(
    tmp_path: Path, tree: dict[str, str], expected: tuple[str | None, str | None]
) -> None:
    """By os-release, or by the files that were there before it."""
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = kernel.os_release(str(tmp_path))
    assert (found.get("id"), found.get("pretty_name")) == expected
