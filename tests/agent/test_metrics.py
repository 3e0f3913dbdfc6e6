"""What is measured beyond the specification: exact figures from the files of several kernels."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from vmprovision.agent import (
    compat,
    exposition,
    files,
    jsonio,
    kernel,
    metrics,
)

HERE = Path(__file__).parent
MODERN, OLD, ODD = (str(HERE / f"proc-{name}") for name in ("6.1", "2.6.18", "odd"))


def figures(proc: str, root: str = "/nowhere") -> dict[str, Any]:
    """Return what `GET /metrics` answers."""
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
    for name in ("cpu_usage_percent", "cpus", "load_average", "memory_total_kb"):
        assert found[name] is None
    assert found["pressure"] == {"io": {"some": {"total_us": 5}}}
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


SANDBOX = """\
22 1 254:1 / / ro,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:22 / /run rw,nosuid - tmpfs tmpfs rw,size=100k
25 22 254:1 /home /home ro,relatime - ext4 /dev/vda1 rw
26 25 254:2 / /home rw,relatime - xfs /dev/vdb rw
27 22 254:1 /root /root ro,relatime - ext4 /dev/vda1 rw
28 24 0:22 /user /run/user ro - tmpfs tmpfs rw,size=100k
29 28 0:30 / /run/user/1000 rw - tmpfs tmpfs rw,size=10k
30 22 0:31 / /tmp rw - tmpfs tmpfs rw
31 30 0:31 /systemd-private-ab-guest-agent.service-cd/tmp /tmp rw - tmpfs tmpfs rw
32 22 254:1 /var/tmp/systemd-private-ab-guest-agent.service-ef/tmp /var/tmp rw - ext4 /dev/vda1 rw
33 22 0:22 /systemd/inaccessible/dir /usr/lib/modules ro - tmpfs tmpfs rw,size=100k
34 24 0:22 /systemd/propagate/guest-agent.service /run/systemd/incoming ro - tmpfs tmpfs rw
35 24 0:40 / /run/private ro - tmpfs tmpfs ro,mode=755
36 35 0:22 /private/guest-agent /run/private/guest-agent rw - tmpfs tmpfs rw
46 24 0:42 / /run/credentials ro - tmpfs tmpfs ro,mode=755
37 24 0:41 / /run/credentials/guest-agent.service ro - tmpfs tmpfs rw
38 22 254:3 / /srv rw - ext4 /dev/vdc rw
39 38 0:22 /systemd/inaccessible/dir /srv ro - tmpfs tmpfs rw
40 22 254:1 /var/lib/web /var/www rw - ext4 /dev/vda1 rw
41 22 254:4 / /covered rw - ext4 /dev/vdd rw
42 41 7:0 / /covered ro - squashfs /dev/loop0 ro
43 22 0:50 /@ /pool rw - btrfs /dev/vde rw,subvol=/@
44 43 0:50 /@home /pool/home rw - btrfs /dev/vde rw,subvol=/@home
45 43 0:50 /@/inner /pool/inner ro - btrfs /dev/vde rw,subvol=/@
"""


def test_a_sandbox_is_seen_through(tmp_path: Path) -> None:
    """Mounts that systemd makes only for services are left out, and so are mounts below them."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(SANDBOX)
    found = [(device, point) for device, point, *_ in kernel.file_systems(str(tmp_path), "/none")]
    assert found == [
        ("/dev/vda1", "/"),
        ("tmpfs", "/run"),
        ("/dev/vdb", "/home"),
        ("tmpfs", "/run/user/1000"),
        ("tmpfs", "/tmp"),  # noqa: S108 -- a line of the table
        ("/dev/vda1", "/var/www"),
        ("/dev/vde", "/pool"),
        ("/dev/vde", "/pool/home"),
    ]


def test_mounts_upon_each_other_in_a_circle(tmp_path: Path) -> None:
    """A table that no kernel writes ends as well."""
    (tmp_path / "self").mkdir()
    lines = ["7 8 8:1 / /a rw - ext4 /dev/a rw\n", "8 7 8:1 / /a rw - ext4 /dev/b rw\n"]
    (tmp_path / "self/mountinfo").write_text("".join(lines + lines))
    assert len(list(kernel.file_systems(str(tmp_path), "/none"))) == 2


@pytest.mark.parametrize("table", ["self/mountinfo", "mounts"])
def test_mounts_without_a_source(tmp_path: Path, table: str) -> None:
    """They are listed, and what is below one that may hang is not."""
    (tmp_path / "self").mkdir()
    mounts = [("/dev/a", "/", "ext4"), ("", "/empty", "tmpfs"), ("", "/fuse", "fuse.sshfs")]
    mounts += [("/dev/b", "/empty/inner", "xfs"), ("/dev/c", "/fuse/inner", "xfs")]
    form = "9 1 8:1 / {1} rw shared:1 - {2} {0} rw\n" if "info" in table else "{0} {1} {2} rw 0 0\n"
    (tmp_path / table).write_text("".join(form.format(*mount) for mount in mounts))
    found = [(device, point) for device, point, *_ in kernel.file_systems(str(tmp_path), "/none")]
    assert found == [("/dev/a", "/"), ("", "/empty"), ("/dev/b", "/empty/inner")]


def test_figures_that_no_machine_has(tmp_path: Path) -> None:
    """Free swap beyond all, endless uptimes and numbers of a thousand digits spoil nothing else."""
    many = "9" * 5000
    (tmp_path / "meminfo").write_text(
        f"MemTotal: 10 kB\nMemFree: 4 kB\nBuffers: {many} kB\nSwapTotal: 5 kB\n"
        f"SwapFree: 18446744073709551488 kB\nMemTotal: 9 kB\nION-heap: 5 kB\nNode 0 Mem: 5 kB\n"
        "Active(anon): 3 kB\nActive_anon: 4 kB\n"
    )
    (tmp_path / "loadavg").write_text("0.5 nan 1e999 1/2 3\n")
    (tmp_path / "vmstat").write_text("pgfault 1\npgfault 2\npgmaj-fault 5\npgpgin\npgpgout 7\n")
    (tmp_path / "stat").write_text(
        f"cpu {many} 1 2 3\ncpu0 1 0 1 2\ncpu0 1 0 1 2\nintr 3\nintr 4\n"
    )
    for uptime in ("nan", "inf", "-5.0", "1e400", many, "x"):
        (tmp_path / "uptime").write_text(f"{uptime} 3.00\n")
        found = figures(str(tmp_path))
        assert found["uptime_seconds"] is None
    assert (found["swap_total_kb"], found["swap_used_kb"]) == (5, 0)
    assert (found["memory_total_kb"], found["memory_used_kb"]) == (9, 5)
    assert (found["load_average"], found["load_average_5"]) == (0.5, None)
    assert (found["cpu_usage_percent"], found["cpus"]) == (None, {"cpu0": 50.0})
    text = b"".join(exposition.render(str(tmp_path), "/nowhere", None)).decode()
    samples = [line.split(" ")[0] for line in text.splitlines() if line[0] != "#"]
    assert len(samples) == len(set(samples))
    names = [line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert not [name for name in names if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name)]
    assert "node_memory_Active_anon_bytes 3072\n" in text
    assert "node_vmstat_pgpgout 7\n" in text


def test_a_mount_point_that_is_no_text(tmp_path: Path) -> None:
    """Its size is found by the bytes that it has; JSON and Prometheus get question marks."""
    (tmp_path / "proc/self").mkdir(parents=True)
    names = [b"caf\xe9", b"caf\xc3\xa9", b"a\\134b", b"a\\777b", b"a\\000b"]
    for name in (b"caf\xe9", b"caf\xc3\xa9", b"a\\b"):
        (tmp_path / os.fsdecode(name)).mkdir()
    lines = [
        b"1%d 1 8:%d / /%s rw - ext4 /dev/a rw\n" % (n, n, name) for n, name in enumerate(names)
    ]
    (tmp_path / "proc/self/mountinfo").write_bytes(b"".join(lines))
    found = list(kernel.file_systems(str(tmp_path / "proc"), str(tmp_path)))
    assert [each[1] for each in found] == ["/caf?", "/caf\xe9", "/a\\b", "/a?b", "/a\0b"]
    assert [each[4] is None for each in found] == [False, False, False, True, True]
    assert (
        figures(str(tmp_path / "proc"), str(tmp_path))["file_systems"][1]["mountpoint"]
        == "/caf\xe9"
    )


def test_file_systems_of_this_host() -> None:
    """Sizes are those that statvfs tells, in kibibytes."""
    found = figures("/proc", "")["file_systems"]
    roots = [each for each in found or [] if each["mountpoint"] == "/"]
    require(roots, "the root of this host is not a local file system", optional=True)
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
        ("nvme3c33n1", False),
        ("mmcblk0p1", False),
        ("mmcblk0boot0", True),
        ("md127p1", False),
        ("nbd15p2", False),
        ("loop0p1", False),
        ("rbd0p1", False),
        ("pmem0p1", False),
        ("cciss/c0d0", True),
        ("cciss/c0d0p1", False),
        ("dasda", True),
        ("dasda1", False),
        ("ubda1", False),
        ("drbd0", True),
        ("bcache0", True),
        ("mtdblock0", True),
        ("mmcblk0", True),
        ("dm-0", True),
        ("md127", True),
        ("loop3", False),
        ("ram0", False),
        ("zram0", False),
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
