"""The agent's parts, on the Python that runs the tests."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmprovision.agent import (
    addresses,
    compat,
    config,
    delivery,
    files,
    guest,
    http,
    jsonio,
    log,
    main,
    metrics,
    tasks,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> str:
    """Return the text of a sample file."""
    return (SAMPLES / name).read_text()


class Collect(log.Log):
    """A log that keeps its lines."""

    def __init__(self) -> None:
        """Begin with no lines."""
        super().__init__()  # type: ignore[no-untyped-call]  # Python 2 runs it
        self.lines: list[str] = []

    def _write(self, level: str, text: str) -> None:
        self.lines.append(f"{level}: {text}")


# --- JSON ---------------------------------------------------------------------------------------


def random_value(rng: random.Random, depth: int = 0) -> object:
    """Return some JSON value."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.randint(-(2**60), 2**60)
    if kind == 2:
        return round(rng.uniform(-1e6, 1e6), 3)
    if kind < 6:
        codes = (*range(128), 0xE9, 0x20AC, 0x1F427, 0xFFFF)
        return "".join(chr(rng.choice(codes)) for _ in range(rng.randrange(12)))
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(number): random_value(rng, depth + 1) for number in range(rng.randrange(4))}


def test_json_is_read_back_unchanged() -> None:
    """The output is pure ASCII, and the standard library reads the same value from it."""
    rng = random.Random(1)
    for _ in range(2000):
        value = random_value(rng)
        text = jsonio.dumps(value)
        assert text.isascii()
        assert json.loads(text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (1.0, "1.0"),
        (0.1 + 0.2, "0.3"),
        (100.0 / 3, "33.333"),
        (-0.5, "-0.5"),
        (100.0, "100.0"),
        (float("nan"), "null"),
        (float("-inf"), "null"),
        (True, "true"),
        (b"\xc3\xa9", '"\\u00e9"'),
        ({"b": 1, "a": (2, [])}, '{"a":[2,[]],"b":1}'),
    ],
)
def test_json_keeps_integers_and_floats_apart(value: object, text: str) -> None:
    """Integers have no fraction, floats always have one, and what JSON lacks is null."""
    assert jsonio.dumps(value) == text


# --- addresses ----------------------------------------------------------------------------------


def found(candidates: list[addresses.Candidate]) -> list[tuple[str, str | None]]:
    """Return addresses and interfaces of candidates."""
    return [(each.address, each.interface) for each in candidates]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ip-oneline",
            [
                ("127.0.0.1", "lo"),
                ("::1", "lo"),
                ("192.168.122.50", "enp1s0"),
                ("2001:db8::50", "enp1s0"),
                ("2001:db8::5054:ff:fe12:3456", "enp1s0"),
                ("fe80::5054:ff:fe12:3456", "enp1s0"),
                ("172.17.0.1", "docker0"),
            ],
        ),
        (
            "ip-multiline",
            [
                ("127.0.0.1", "lo"),
                ("192.0.2.2", "wan0"),
                ("fe80::fc:ff:fe00:1", "wan0"),
                ("10.8.0.6", "tun0"),
            ],
        ),
        ("ip-busybox", [("127.0.0.1", "lo"), ("192.0.2.2", "eth0"), ("fd00::2", "eth0")]),
        ("ip-broken", []),
    ],
)
def test_ip_address_output(name: str, expected: list[tuple[str, str]]) -> None:
    """All dialects of ``ip addr show`` are read; tentative and malformed addresses are not."""
    assert found(addresses.parse_ip_address(sample(name))) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ifconfig-old-net-tools",
            [
                ("10.0.2.15", "eth0"),
                ("fe80::5054:ff:fe12:3456", "eth0"),
                ("10.0.2.16", "eth0"),
                ("127.0.0.1", "lo"),
                ("::1", "lo"),
            ],
        ),
        (
            "ifconfig-new-net-tools",
            [
                ("192.0.2.2", "ens3"),
                ("fe80::fc:ff:fe00:1", "ens3"),
                ("fd00::2", "ens3"),
                ("192.0.2.3", "ens3"),
                ("127.0.0.1", "lo"),
                ("::1", "lo"),
            ],
        ),
        (
            "ifconfig-busybox",
            [
                ("192.0.2.2", "eth0"),
                ("fe80::fc:ff:fe00:1", "eth0"),
                ("fd00::2", "eth0"),
                ("127.0.0.1", "lo"),
            ],
        ),
    ],
)
def test_ifconfig_output(name: str, expected: list[tuple[str, str]]) -> None:
    """Old net-tools, new net-tools and busybox are read, second addresses included."""
    assert found(addresses.parse_ifconfig(sample(name))) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("route-get-iproute2", [("192.0.2.2", "ens3")]),
        ("route-get-old-iproute2", [("10.0.2.15", "eth0")]),
        ("route-get-busybox", [("192.0.2.2", "eth0")]),
        ("route-get-unreachable", []),
    ],
)
def test_ip_route_get_output(name: str, expected: list[tuple[str, str]]) -> None:
    """The source address of a route is found, and an error message is none."""
    assert found(addresses.parse_route_get(sample(name))) == expected


@pytest.mark.parametrize(
    "name", ["inet", "inet6", "del", "dev", "src", "via", "tentative", "temporary"]
)
def test_interfaces_that_are_called_like_words(name: str) -> None:
    """The text around an interface's name, from ``ip`` and ``ifconfig``, shows its kind."""
    line = f"inet 10.9.0.1/24 brd 10.9.0.255 scope global {name}"
    six = "inet6 fd00::1/64 scope global"
    oneline = (
        f"2: {name}    {line}\\       valid_lft forever\n2: {name}    {six} \\       valid_lft"
    )
    multiline = f"2: {name}: <BROADCAST,UP> mtu 1500\n    {line}\n       valid_lft\n    {six}\n"
    both = [("10.9.0.1", name), ("fd00::1", name)]
    for text in (oneline, multiline):
        told = addresses.parse_ip_address(text)
        assert found(told) == both
        assert not [each for each in told if each.temporary]
    new = f"{name}: flags=4163<UP,RUNNING>  mtu 1500\n        inet 10.9.0.1  netmask 1\n"
    new += "        inet6 fd00::1  prefixlen 64\n"
    old = f"{name:9} Link encap:Ethernet\n          inet addr:10.9.0.1  Bcast:1\n"
    old += "          inet6 addr: fd00::1/64 Scope:Global\n          UP RUNNING  MTU:1500\n"
    for text in (new, old):
        assert found(addresses.parse_ifconfig(text)) == both
    route = f"1.0.0.0 via 10.9.0.254 dev {name} src 10.9.0.1 uid 0\n    cache\n"
    assert found(addresses.parse_route_get(route)) == both[:1]


def test_names_that_ifconfig_has_cut(tmp_path: Path) -> None:
    """Nine characters are completed if one interface begins so; each keeps its own flags."""
    (tmp_path / "net").mkdir()
    device = "  {}: " + "0 " * 16 + "\n"
    names = ("enx001122334455", "enp129s0f0", "enp129s0f1", "wlp0s20f3")
    (tmp_path / "net/dev").write_text("Inter-|\n face |\n" + "".join(map(device.format, names)))
    text = "".join(
        f"{name[:9]} Link encap:Ethernet\n  inet addr:10.0.0.{number}\n  {flags}  MTU:1500\n\n"
        for number, (name, flags) in enumerate(
            zip(names, ("UP RUNNING", "UP RUNNING", "UP", "UP RUNNING"), strict=True)
        )
    )
    told = addresses.parse_ifconfig(text)
    addresses.complete_names(told, str(tmp_path))
    assert [(each.interface, each.idle) for each in told] == [
        ("enx001122334455", False),
        (None, False),
        (None, True),
        ("wlp0s20f3", False),
    ]


def candidates(*pairs: tuple[str, str | None]) -> list[addresses.Candidate]:
    """Return candidates from addresses and interfaces."""
    return [addresses.Candidate(address, interface) for address, interface in pairs]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("127.0.0.1", "lo"), ("::1", "lo")], ([], False)),
        ([("10.0.0.1", "ens3"), ("10.0.0.2", "ens4")], (["10.0.0.2", "10.0.0.1"], True)),
        ([("172.17.0.1", "docker0"), ("10.0.0.1", "x")], (["10.0.0.1", "172.17.0.1"], True)),
        ([("172.17.0.1", "docker0"), ("fd00::1", "ens4")], (["fd00::1", "172.17.0.1"], True)),
        ([("fd00::1", "ens4"), ("10.0.0.1", "ens3")], (["10.0.0.1", "fd00::1"], True)),
        ([("fe80::1", "ens4"), ("169.254.3.4", "ens4")], (["169.254.3.4", "fe80::1"], False)),
        ([("169.254.3.4", "ens4"), ("fd00::1", "ens3")], (["fd00::1"], True)),
        ([("10.0.0.1", "ens3"), ("10.0.0.1", "ens3")], (["10.0.0.1"], True)),
        ([("10.0.0.1", None)], (["10.0.0.1"], True)),
        ([("192.0.0.1", "ens4"), ("2001:db8::1", "x")], (["2001:db8::1", "192.0.0.1"], True)),
        ([("192.0.0.9", "ens4"), ("2001:db8::1", "x")], (["192.0.0.9", "2001:db8::1"], True)),
        ([("192.0.0.1", "ens4"), ("fe80::1", "ens4")], (["192.0.0.1"], True)),
    ],
)
def test_the_best_address_comes_first(
    pairs: list[tuple[str, str]], expected: tuple[list[str], bool]
) -> None:
    """With the default route on ens4: IPv4, then IPv6, then inner bridges; the rest only alone."""
    assert addresses.choose(candidates(*pairs), ("ens4", "ens4")) == expected


@pytest.mark.parametrize("name", ["lo", "wg0", "tun0", "kube-ipvs0", "docker0", "dummy0", "idle0"])
@pytest.mark.parametrize("other", ["10.9.0.9", "fd00::9"])
def test_without_a_default_route_a_real_interface_is_first(name: str, other: str) -> None:
    """An address on the loopback, a tunnel or a link without carrier is not the main address."""
    odd = addresses.Candidate("10.0.0.1", name, idle=name == "idle0")
    real = addresses.Candidate(other, "eth0")
    assert addresses.choose([odd, real], (None, None)) == ([other, "10.0.0.1"], True)
    if name in ("lo", "idle0"):  # a default route there leads nowhere
        assert addresses.choose([odd, real], (name, None))[0][0] == other
    assert addresses.choose([odd], (None, None)) == (["10.0.0.1"], True)


@pytest.mark.parametrize(
    "text",
    [
        "2: eth1: <NO-CARRIER,BROADCAST,MULTICAST,UP> mtu 1500\n    inet 10.0.0.1/24 scope\n",
        "2: eth1: <BROADCAST,MULTICAST> mtu 1500\n    inet 10.0.0.1/24 scope global\n",
        "2: xyz0: <LOOPBACK,UP,LOWER_UP> mtu 1500\n    inet 10.0.0.1/24 scope global\n",
        "eth1: flags=4099<UP,BROADCAST,MULTICAST>  mtu 1500\n        inet 10.0.0.1\n",
        "eth1      Link encap:Ethernet\n    inet addr:10.0.0.1\n    UP BROADCAST  MTU:1500\n",
    ],
    ids=["no-carrier", "down", "loopback", "ifconfig", "old-ifconfig"],
)
def test_links_without_carrier_are_told_by_programs_too(text: str) -> None:
    """The flags that ``ip`` and ``ifconfig`` print say which interfaces lead nowhere."""
    parsers: tuple[Callable[[str], list[addresses.Candidate]], ...] = (
        addresses.parse_ifconfig,
        addresses.parse_ip_address,
    )
    parse = parsers[text[0] == "2"]
    (candidate,) = parse(text)
    assert candidate.idle
    (candidate,) = parse(
        text.replace("<NO-CARRIER,", "<")
        .replace("LOOPBACK,", "")
        .replace("MULTICAST>", "MULTICAST,UP,RUNNING>")
        .replace("BROADCAST  ", "RUNNING  ")
    )
    assert not candidate.idle


def test_a_chosen_interface_is_the_only_one() -> None:
    """With INTERFACE set, other interfaces do not count, not even when it has no address."""
    offered = candidates(("10.0.0.1", "ens3"), ("10.0.0.2", "ens4"))
    assert addresses.choose(offered, ("ens4", None), "ens3") == (["10.0.0.1"], True)
    assert addresses.choose(offered, ("ens4", None), "ens5") == ([], False)


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
ens3\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
ens4\t00000000\t010200C0\t0003\t0\t0\t50\t00000000\t0\t0\t0
ens5\t00000000\t010200C0\t0002\t0\t0\t0\t00000000\t0\t0\t0
ens3\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
ZEROS = "0" * 32
ROUTES6 = (
    f"fd00{'0' * 28} 40 {ZEROS} 00 {ZEROS} 00000100 00000001 00000000 00000001     ens3\n"
    f"{ZEROS} 00 {ZEROS} 00 fd00{'0' * 27}1 00000400 00000002 00000000 00000003     ens6\n"
    f"{ZEROS} 00 {ZEROS} 00 {ZEROS} ffffffff 00000001 00000000 00200200       lo\n"
    f"{ZEROS} 00 {ZEROS} 00 {ZEROS} 00000000 00000001 00000000 00200200     ens7\n"
)
FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 192.0.2.0
        /24 link UNICAST
     |-- 192.0.2.2
        /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
Local:
     |-- 192.0.2.2
        /32 host LOCAL
     |-- 10.5.0.1
        /32 host LOCAL
"""
IF_INET6 = """fe8000000000000000fc00fffe000001 04 40 20 80     ens3
fd000000000000000000000000000002 04 40 00 82     ens3
fd000000000000000000000000000003 04 40 00 c0     ens3
"""


def make_proc_net(folder: Path) -> str:
    """Return a /proc with network tables."""
    (folder / "net").mkdir()
    for name, text in (
        ("route", ROUTES),
        ("ipv6_route", ROUTES6),
        ("fib_trie", FIB_TRIE),
        ("if_inet6", IF_INET6),
    ):
        (folder / "net" / name).write_text(text)
    return str(folder)


def test_the_default_routes_interfaces(tmp_path: Path) -> None:
    """The lowest metric wins; routes that are down or reject do not count."""
    assert addresses.default_interfaces(make_proc_net(tmp_path)) == ("ens4", "ens6")


def test_without_routes_there_is_no_default_interface(tmp_path: Path) -> None:
    """A /proc without tables has no default interface and no addresses."""
    assert addresses.default_interfaces(str(tmp_path)) == (None, None)
    assert addresses.read_kernel_tables(str(tmp_path)) == []


def test_the_kernels_own_tables(tmp_path: Path) -> None:
    """Each local address is found once, on the interface whose network it is in."""
    assert found(addresses.read_kernel_tables(make_proc_net(tmp_path))) == [
        ("192.0.2.2", "ens3"),
        ("10.5.0.1", None),
        ("fe80::fc:ff:fe00:1", "ens3"),
        ("fd00::2", "ens3"),
    ]


def test_odd_tables_are_no_addresses(tmp_path: Path) -> None:
    """Tables full of nonsense raise nothing and give nothing."""
    (tmp_path / "net").mkdir()
    for name in ("route", "ipv6_route", "fib_trie", "if_inet6"):
        (tmp_path / "net" / name).write_bytes(b"x\n" + b"\xff zz |-- q r s t u v w x\n" * 20)
    assert addresses.default_interfaces(str(tmp_path)) == (None, None)
    assert addresses.read_kernel_tables(str(tmp_path)) == []


def test_the_fingerprint_follows_the_tables(tmp_path: Path) -> None:
    """The fingerprint is the same for the same tables and another for others."""
    proc = make_proc_net(tmp_path)
    before = addresses.fingerprint(proc)
    assert addresses.fingerprint(proc) == before
    (tmp_path / "net" / "if_inet6").write_text("")
    assert addresses.fingerprint(proc) != before


# --- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meminfo-6.1", (24684092, 23917164)),
        ("meminfo-2.6.32", (1020540, 779220 + 9308 + 116364 + 12472 - 220)),
        ("meminfo-2.6.18", (515444, 37744 + 80996 + 272392)),
        ("meminfo-odd", (None, 1)),
    ],
)
def test_memory(name: str, expected: tuple[int | None, int | None]) -> None:
    """Available memory is the kernel's own figure, or what old kernels let us add up."""
    assert metrics.parse_memory(sample(name).encode())[:2] == expected


def test_available_memory_stays_within_the_total() -> None:
    """Figures that contradict each other never give a negative use."""
    assert metrics.parse_memory(b"MemTotal: 10 kB\nMemAvailable: 20 kB\n")[:2] == (10, 10)
    assert metrics.parse_memory(b"MemTotal: 10 kB\nMemFree: 4 kB\nShmem: 9 kB\n")[:2] == (10, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stat-6.1", [57246, 0, 22345, 488216, 1400, 0, 598, 82]),
        ("stat-2.6.9", [1209, 8, 4512, 912345, 1010, 3, 99]),
        ("stat-2.4", [1209, 8, 4512, 912345]),
    ],
)
def test_processor_counters(name: str, expected: list[int]) -> None:
    """Long and short lines are read; guest time is not counted twice."""
    assert metrics.parse_cpus(sample(name).encode())["cpu"] == expected


@pytest.mark.parametrize("stat", [b"", b"cpu", b"cpu 1 2\n", b"cpu a b c d\n", b"intr 1 2 3 4\n"])
def test_odd_processor_counters_are_none(stat: bytes) -> None:
    """A /proc/stat without a usable line gives nothing."""
    assert metrics.parse_cpus(stat) == {}


@pytest.mark.parametrize(
    ("before", "after", "usage"),
    [
        ([0, 0, 0, 0], [25, 0, 0, 75], 25.0),
        ([10, 0, 0, 10, 50, 0, 0, 0], [10, 0, 0, 20, 40, 0, 0, 10], 50.0),
        ([5, 5, 5, 5, 5, 0, 0, 0], [5, 5, 5, 5, 5, 0, 0, 0], 0.0),
        ([9, 9, 9, 9, 9, 9, 9, 9], [0, 0, 0, 0, 0, 0, 0, 0], 0.0),
    ],
)
def test_processor_usage(before: list[int], after: list[int], usage: float) -> None:
    """Steal is busy, iowait is idle, and counters that go back count as unchanged."""
    assert metrics.cpu_usage(before, after) == usage


# --- guest --------------------------------------------------------------------------------------


def test_a_process_name_may_hold_anything() -> None:
    """Spaces and parentheses in a name do not shift the other fields."""
    assert guest.parse_process(b"71 (a) S (b c)) S 12 71 71 0") == {
        "pid": 71,
        "comm": "a) S (b c)",
        "ppid": 12,
    }


@pytest.mark.parametrize("stat", [b"", b"1", b"1 (init", b"x (init) S 0", b"1 (init) S y"])
def test_odd_process_lines_are_none(stat: bytes) -> None:
    """A malformed line gives None."""
    assert guest.parse_process(stat) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/system.slice/guest-agent.service\n", "/system.slice/guest-agent.service"),
        ("9:memory:/x\n1:name=systemd:/system.slice/a.service\n0::/\n", "/system.slice/a.service"),
        ("1:name=systemd:/\n0::/openrc.guest-agent\n", "/openrc.guest-agent"),
        ("4:memory:/x\n", None),
        ("", None),
    ],
)
def test_the_cgroup_that_says_most(text: str, path: str | None) -> None:
    """The hierarchy of systemd, else the unified one, else nothing."""
    assert guest.parse_cgroup(text.encode()) == path


# --- configuration ------------------------------------------------------------------------------


def parse(text: str) -> tuple[config.Settings, list[str]]:
    """Return settings and log lines from a configuration text."""
    collect = Collect()
    settings = config.parse_settings(config.parse_pairs(text.encode(), collect), collect)
    return settings, collect.lines


def test_a_full_configuration() -> None:
    """Every key is understood, with quotes, comments and spaces."""
    settings, lines = parse(
        "VM_ID=web-1\nMANAGER_URL='https://[fd00::1]:8443/a/b/'\nPORT=9000 # not 8080\n"
        'LISTEN = "[::1]"\nexport TOKEN=abc#def\nINTERFACE=ens3\nLOG_FILE=/var/log/a b\n'
    )
    assert lines == []
    assert (settings.vm_id, settings.port, settings.listen) == ("web-1", 9000, ["[::1]"])
    assert (settings.token, settings.interface, settings.log_file) == (
        *("abc#def", "ens3", "/var/log/a b"),
    )
    url = settings.manager
    assert url is not None
    assert (url.scheme, url.host, url.port, url.prefix) == ("https", "fd00::1", 8443, "/a/b")
    assert url.authority() == "[fd00::1]:8443"


def test_empty_values_are_none() -> None:
    """A key without a value leaves the default, and the last value of a key counts."""
    settings, lines = parse('VM_ID=\nPORT=""\nMANAGER_URL= # later\nINTERFACE=a\nINTERFACE=b\n')
    assert (settings.vm_id, settings.port, settings.manager) == (None, 8080, None)
    assert settings.interface == "b"
    assert lines == []


@pytest.mark.parametrize("value", ["abc", "-1", "65536", "80 80", "0x50", "999999999999", "²"])
def test_bad_ports(value: str) -> None:
    """A port that is none is logged and the default stays."""
    settings, lines = parse(f"PORT={value}\n")
    assert settings.port == 8080
    assert lines == ["warning: configuration: PORT is not a port number: ignored"]


@pytest.mark.parametrize(
    "value",
    [
        *("m", "ftp://m", "http://", "http://:80", "http://m:x", "http://m:99999", "http://u:p@m"),
        *("http://m/?q", "http://m/#f", "http://[::1", "http://[m]", "http://[::1]x", "http://a b"),
        'http://a"b',
    ],
)
def test_bad_urls(value: str) -> None:
    """A URL that cannot be a manager's is refused and not repeated in the log."""
    settings, lines = parse(f"MANAGER_URL='{value}'\n")
    assert settings.manager is None
    assert len(lines) == 1
    assert value not in lines[0]


@pytest.mark.parametrize(
    ("value", "authority", "port", "prefix"),
    [
        ("http://m", "m", 80, ""),
        ("HTTP://m:80/", "m", 80, ""),
        ("https://m", "m", 443, ""),
        ("http://10.0.0.1:8080/x//", "10.0.0.1:8080", 8080, "/x"),
        ("http://[fe80::1%25eth0]", "[fe80::1]", 80, ""),
    ],
)
def test_good_urls(value: str, authority: str, port: int, prefix: str) -> None:
    """Scheme, host, port and path are taken apart; default ports are left out of Host."""
    url = config.parse_url(value)
    assert (url.authority(), url.port, url.prefix) == (authority, port, prefix)


def test_a_huge_configuration_is_cut(tmp_path: Path) -> None:
    """Of a file beyond the limit, whole lines of the first 64 KiB count."""
    path = tmp_path / "conf"
    path.write_text("VM_ID=first\n" + "#" * 70 + "\n" + "A=1\n" * 30000 + "VM_ID=last\n")
    collect = Collect()
    assert config.read_settings(str(path), collect).vm_id == "first"
    assert "only the first 65536 bytes" in collect.lines[0]


def test_a_missing_configuration_is_the_defaults(tmp_path: Path) -> None:
    """Without a file everything has its default."""
    settings = config.read_settings(str(tmp_path / "none"), Collect())
    assert (settings.vm_id, settings.port, settings.manager) == (None, 8080, None)


def test_the_command_line() -> None:
    """Options take their value from the next word or after an equals sign."""
    assert main.parse_arguments(["--port", "80", "--listen=::1", "--log-file", "-"]) == {
        "--port": 80,
        "--listen": ["::1"],
        "--log-file": "-",
    }


# --- HTTP ---------------------------------------------------------------------------------------


def test_a_head_is_complete_wherever_it_is_cut() -> None:
    """However a request is split, it is incomplete before its last byte and complete with it."""
    data = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
    for cut in range(len(data)):
        assert http.take_head(data[:cut])[0] is None
    assert http.take_head(data + b"rest") == (data, b"rest")


def test_random_heads_raise_nothing_else() -> None:
    """Random bytes are a request or a RequestError with a known status."""
    rng = random.Random(3)
    statuses = set()
    alphabet = b"GET /HTP1.0:\r\n\n ab\x00\xff,;-59"
    for _ in range(5000):
        start = rng.choice([b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.0\r\nContent-Length: "])
        data = start + bytes(rng.choices(alphabet, k=rng.randrange(60))) + b"\r\n\r\n"
        try:
            head, _rest = http.take_head(data)
            if head is not None:
                assert http.parse_head(head).body_length <= http.BODY_LIMIT
        except http.RequestError as error:
            statuses.add(error.args[0])
    assert statuses <= set(http.REASONS)
    assert {400, 501, 505} & statuses


# --- reports ------------------------------------------------------------------------------------


def make_settings(text: str) -> config.Settings:
    """Return settings from a configuration that has no faults."""
    settings, lines = parse(text)
    assert lines == []
    return settings


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", None),
        (b"HTTP/1.1 20", None),
        (b"HTTP/1.1 204 No Content\r\n", 204),
        (b"HTTP/1.0 200\n", 200),
        (b"HTTP/1.1 100 Continue\r\n\r\n", None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 C\r\n", 201),
        (b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 404 N\r\n", 404),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 0),
        (b"x" * 5000, 0),
        (b"HTTP/1.1 abc\r\n", 0),
    ],
)
def test_a_managers_answer(answer: bytes, status: int | None) -> None:
    """The final status is found, interim answers are skipped, other protocols are recognised."""
    assert delivery.parse_status(answer) == status


@pytest.mark.parametrize(
    ("vm_id", "segment"),
    [("a-b_c.d~9", "a-b_c.d~9"), ("a/b?c#d", "a%2Fb%3Fc%23d"), ("..", "%2E%2E"), ("ü", "%C3%BC")],
)
def test_the_vm_id_is_one_segment(vm_id: str, segment: str) -> None:
    """Any VM_ID stays one segment of the path."""
    assert delivery.quote(vm_id) == segment


def test_programs_never_show_the_token() -> None:
    """With a token, neither curl nor wget gets it as an argument, and busybox is not tried."""
    settings = make_settings("VM_ID=a\nTOKEN=s3\nMANAGER_URL=https://m\n")
    tried = delivery.programs(settings, "10.0.0.1")
    assert [argv[0] for argv, _ in tried] == ["curl", "wget"]
    assert not [argv for argv, _ in tried if "s3" in " ".join(argv)]
    assert all(b"Bearer s3" in stdin for _, stdin in tried)
    settings = make_settings("VM_ID=a\nMANAGER_URL=https://m\n")
    assert len(delivery.programs(settings, "10.0.0.1")) == 3


# --- log and waiting ----------------------------------------------------------------------------


def test_the_log_cannot_be_forged(tmp_path: Path) -> None:
    """Line breaks and escape sequences in a message stay on one line of ASCII."""
    path = tmp_path / "log"
    log.Log(str(path)).info("a\nb\x1b[31mé")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ guest-agent: info: a\\u000ab\\u001b\[31m\\u00e9\n",
        path.read_text(),
    )


def test_the_log_stays_within_two_files(tmp_path: Path) -> None:
    """However much is logged, the file and its predecessor stay below the limit."""
    path = tmp_path / "log"
    writer = log.Log(str(path), limit=1000)
    for number in range(200):
        writer.info(f"line {number}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log", "log.1"]
    assert max(entry.stat().st_size for entry in tmp_path.iterdir()) <= 1000
    assert path.read_text().endswith("line 199\n")


def test_provoked_lines_are_limited(tmp_path: Path) -> None:
    """Messages that a client can cause are logged at most twenty times a minute."""
    path = tmp_path / "log"
    writer = log.Log(str(path))
    for number in range(100):
        writer.limited(f"line {number}")
    assert len(path.read_text().splitlines()) == 20


def test_pauses_end_in_time() -> None:
    """Pauses grow, but together they are as long as asked."""
    clock = compat.Clock()
    started = time.monotonic()
    for pause in tasks.pauses(0.3, clock):
        assert 0 <= pause <= 0.3
        time.sleep(pause)
    assert 0.29 < time.monotonic() - started < 1


def run_now(argv: tuple[str, ...], seconds: float = 5.0, stdin: bytes = b"") -> tasks.Outcome:
    """Return the outcome of a program, waited for."""
    outcome = tasks.Outcome()
    for pause in tasks.run_program(argv, seconds, outcome, compat.Clock(), stdin):
        time.sleep(pause)
    return outcome


def test_programs_are_run() -> None:
    """Status, output and input of a program arrive; a missing program is status 127."""
    assert run_now(("sh", "-c", "cat; exit 3"), stdin=b"given").output == b"given"
    assert run_now(("sh", "-c", "exit 3")).status == 3
    assert run_now(("/no/such/program",)).status == 127
    flood = run_now(("sh", "-c", "head -c 1000000 /dev/zero"))
    assert flood.status == 0
    assert len(flood.output) < 100_000


def test_programs_are_given_up() -> None:
    """A program that takes too long is killed with its children and has no status."""
    started = time.monotonic()
    assert run_now(("sh", "-c", "sleep 60 & sleep 60"), seconds=0.2).status is None
    assert time.monotonic() - started < 2


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    """No more than the limit is read, and what cannot be read is empty."""
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    assert len(files.read_bounded(str(tmp_path / "big"))) == 65536
    assert len(files.read_bounded(str(tmp_path / "big"), 10)) == 10
    assert files.read_bounded(str(tmp_path)) == b""
    assert files.read_bounded(str(tmp_path / "none")) == b""
