"""Finds the guest's own address, whatever its interfaces are called.

Four ways in the order of the specification, each used only if those before
it found no address worth reporting: ``ip addr show`` (ip-address(8), busybox),
``ifconfig`` (ifconfig(8) of old and new net-tools, busybox), ``ip route get
1``, and the kernel's own tables in /proc/net for guests without any of them.
"""

import sys

from . import compat
from .files import read_bounded

COMMANDS = (
    ("ip", "-o", "addr", "show"),
    ("ip", "addr", "show"),
    ("ifconfig",),
    ("ip", "route", "get", "1"),
)

# Addresses on these are the guest's own business; prefixes of names given by the programs that
# make them. Only a tie-break: with nothing else, they are reported.
_INNER = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "lxc", "lxd", "podman")

_HOPELESS = 6  # the first rank that is only reported when every way has been tried


class Candidate(object):
    """An address, the interface it is on (None if unknown) and whether it is short-lived."""

    def __init__(self, address, interface, temporary=False):
        self.address = address
        self.interface = interface
        self.temporary = temporary


def is_ipv4(text):
    """Whether the text is an IPv4 address in dotted decimal."""
    parts = text.split(".")
    return len(parts) == 4 and not [
        part for part in parts if not compat.is_digits(part) or len(part) > 3 or int(part) > 255
    ]


def is_ipv6(text):
    """Whether the text looks like an IPv6 address without a zone."""
    return text.count(":") >= 2 and not [
        character for character in text.lower() if character not in "0123456789abcdef:."
    ]


def _address(word):
    word = word.split("/")[0].split("%")[0].lower()
    return word if is_ipv4(word) or is_ipv6(word) else None


def parse_ip_address(text):
    """Candidates from ``ip addr show``, with or without ``-o``."""
    found = []
    interface = None
    for line in text.split("\n"):
        words = line.replace("\\", " ").split()
        if len(words) < 2:
            continue
        if line[:1].isdigit():
            interface = words[1].rstrip(":").split("@")[0]
        for kind in ("inet", "inet6"):
            if kind in words[:-1]:
                address = _address(words[words.index(kind) + 1])
                if address and "tentative" not in words and "dadfailed" not in words:
                    temporary = "temporary" in words or "deprecated" in words
                    found.append(Candidate(address, interface, temporary))
    return found


def parse_ifconfig(text):
    """Candidates from ``ifconfig`` in the dialects of old and new net-tools and of busybox."""
    found = []
    interface = None
    for line in text.split("\n"):
        words = line.split()
        if words and line[:1] not in (" ", "\t"):
            # "eth0", "eth0:" or, for a second address, "eth0:1"
            interface = words[0].split(":")[0]
        for index, word in enumerate(words[:-1]):
            if word in ("inet", "inet6"):
                value = words[index + 1]
                if value == "addr:" and index + 2 < len(words):
                    value = words[index + 2]
                elif value.startswith("addr:"):
                    value = value[5:]
                address = _address(value)
                if address:
                    found.append(Candidate(address, interface))
    return found


def parse_route_get(text):
    """The candidate that ``ip route get`` names as the source address, as a list."""
    words = text.split()
    if "src" not in words[:-1]:
        return []
    address = _address(words[words.index("src") + 1])
    interface = words[words.index("dev") + 1] if "dev" in words[:-1] else None
    return [Candidate(address, interface)] if address else []


PARSERS = (parse_ip_address, parse_ip_address, parse_ifconfig, parse_route_get)


def _route_lines(proc):
    for line in compat.to_text(read_bounded(proc + "/net/route")).split("\n")[1:]:
        words = line.split()
        if len(words) >= 8 and compat.is_digits(words[3]) and compat.is_digits(words[6]):
            yield words


def default_interfaces(proc):
    """The interfaces of the IPv4 and the IPv6 default route, each None if there is no such route.

    Of several routes the one with the lowest metric counts.
    """
    best4 = best6 = (None, None)
    for words in _route_lines(proc):
        if words[1] == words[7] == "00000000" and int(words[3]) & 1:  # RTF_UP
            if best4[0] is None or int(words[6]) < best4[0]:
                best4 = (int(words[6]), words[0])
    for line in compat.to_text(read_bounded(proc + "/net/ipv6_route")).split("\n"):
        words = line.split()
        if len(words) == 10 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
            metric = int(words[5], 16)
            if not int(words[8], 16) & 0x200 and (best6[0] is None or metric < best6[0]):
                best6 = (metric, words[9])  # 0x200 is RTF_REJECT
    return best4[1], best6[1]


def _ipv4_number(address):
    number = 0
    for part in address.split("."):
        number = number * 256 + int(part)
    return number


def _route_number(word):
    # The kernel prints a big-endian number as if it were one of its own.
    number = int(word, 16)
    if sys.byteorder == "big":
        return number
    return (
        (number & 255) << 24 | (number >> 8 & 255) << 16 | (number >> 16 & 255) << 8 | number >> 24
    )


def read_kernel_tables(proc):
    """Candidates from /proc/net/fib_trie and /proc/net/if_inet6."""
    networks = []
    for words in _route_lines(proc):
        mask = _route_number(words[7])
        if mask:
            networks.append((_route_number(words[1]), mask, words[0]))
    found = []
    seen = set()
    last = None
    for line in compat.to_text(read_bounded(proc + "/net/fib_trie")).split("\n"):
        words = line.split()
        if words[:1] == ["|--"] and len(words) > 1:
            last = words[1]
        elif words[:3] == ["/32", "host", "LOCAL"] and last not in seen and is_ipv4(last or ""):
            seen.add(last)
            number = _ipv4_number(last)
            on = [name for network, mask, name in networks if number & mask == network]
            found.append(Candidate(last, on[0] if on else None))
    for line in compat.to_text(read_bounded(proc + "/net/if_inet6")).split("\n"):
        words = line.split()
        # The fifth word has the flags: tentative and failed addresses are not ours yet.
        if len(words) == 6 and len(words[0]) == 32 and not int(words[4], 16) & 0x48:
            groups = [words[0][at : at + 4] for at in range(0, 32, 4)]
            address = ":".join([group.lstrip("0") or "0" for group in groups])
            found.append(Candidate(address, words[5], bool(int(words[4], 16) & 0x21)))
    return found


def is_loopback(address):
    """Whether the address only ever reaches the guest itself, or nobody."""
    return address.startswith("127.") or address in ("::1", "0:0:0:0:0:0:0:1", "::", "0.0.0.0")


def is_link_local(address):
    """Whether the address is one a host gives itself (RFC 3927, RFC 4291)."""
    return address.startswith("169.254.") or address[:3] in ("fe8", "fe9", "fea", "feb")


def _rank(candidate, default4, default6):
    version6 = ":" in candidate.address
    if is_link_local(candidate.address):
        return _HOPELESS + version6
    if version6:
        return 3 if candidate.interface == default6 else 4
    if candidate.interface and candidate.interface == default4:
        return 0
    if candidate.interface and candidate.interface == default6:
        return 1
    inner = [prefix for prefix in _INNER if (candidate.interface or "").startswith(prefix)]
    return 5 if inner else 2


def choose(candidates, defaults, interface=None):
    """The addresses worth reporting, best first, and whether the best is a good one.

    IPv4 comes before IPv6, and what is on the default route's interface before
    the rest. Link-local addresses count only if there is nothing else, loopback
    never. With ``interface`` given only its addresses count.
    """
    ranked = []
    for place, each in enumerate(candidates):
        if is_loopback(each.address) or (interface and each.interface != interface):
            continue
        rank = _rank(each, defaults[0], defaults[1])
        ranked.append((rank, each.temporary, place, each.address))
    ranked.sort()
    good = [entry for entry in ranked if entry[0] < _HOPELESS]
    chosen = []
    for entry in good or ranked:
        if entry[3] not in chosen:
            chosen.append(entry[3])
    return chosen, bool(good)


def fingerprint(proc):
    """Something that differs when addresses or routes have changed; cheap enough to ask often."""
    names = ("/net/fib_trie", "/net/if_inet6", "/net/route")
    return hash(b"".join([read_bounded(proc + name) for name in names]))
