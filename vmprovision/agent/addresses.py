"""Find the guest's own address, whatever its interfaces are called.

The kernel is queried first, without starting a program: by rtnetlink(7), else through its
tables in /proc/net. If neither has a suitable address, the specification's programs
follow, each only if the earlier ones found none: ``ip addr
show`` (ip-address(8), busybox), ``ifconfig`` (ifconfig(8) of old and new
net-tools, busybox) and ``ip route get 1``.
"""

import sys

from . import compat
from .compat import socket
from .files import read_bounded

COMMANDS = (("ip", "addr", "show"), ("ifconfig",), ("ip", "route", "get", "1"))

# Prefixes of interface names for addresses inside the guest. Only a tie-break: if there are no
# other addresses, these are reported.
_INNER = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "cilium", "lxc", "lxd")
_INNER += ("incus", "podman", "kube", "dummy", "tun", "tap", "wg", "zt")

_HOPELESS = 9  # addresses from this rank on are reported only after every method was tried

_GETLINK, _GETADDR, _GETROUTE = 18, 22, 26  # RTM_GETLINK and so on
_LINK, _ADDRESS, _ROUTE = 16, 20, 24
_REQUEST, _DUMP = 1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
_WIRES = (1, 6, 32)  # ARPHRD_ETHER, _IEEE802 and _INFINIBAND: everything else is a tunnel


class Candidate(object):
    """An address, its interface (None if unknown), and whether it is short-lived.

    ``idle``: no other machine reaches the guest there, because the interface is the
    loopback, is down or has no carrier. ``inner``: it is a tunnel.
    """

    def __init__(self, address, interface, temporary=False, idle=False, inner=False):
        self.address = address
        self.interface = interface
        self.temporary = temporary
        self.idle = idle
        self.inner = inner


def is_ipv4(text):
    """Return whether the text is an IPv4 address in dotted decimal."""
    parts = text.split(".")
    return len(parts) == 4 and not [
        part for part in parts if not compat.is_digits(part) or len(part) > 3 or int(part) > 255
    ]


def _address(word):
    """Return an address in the canonical form of RFC 5952, or None."""
    word = word.split("/")[0].split("%")[0]
    if ":" not in word and not is_ipv4(word):
        return None
    packed = compat.pack_address(word)
    return packed and format_address(packed)


def format_address(packed):
    """Return a packed address as text, of IPv6 in the form of RFC 5952."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def parse_ip_address(text):
    """Return candidates from ``ip addr show``, with or without ``-o``."""
    found = []
    interface = None
    idle = False
    for line in text.split("\n"):
        words = line.split("\\")[0].split()
        if len(words) < 2:
            continue
        if line[:1].isdigit():
            interface = words[1].rstrip(":").split("@")[0]
            flags = words[2][1:-1].split(",") if words[2:] and words[2][0] == "<" else ["UP"]
            idle = "UP" not in flags or "NO-CARRIER" in flags or "LOOPBACK" in flags
            words = words[2:]  # an interface's name may be one of the words below
        if words[:1] in (["inet"], ["inet6"]) and words[1:]:
            address = _address(words[1])
            flags = words[2:] if words[0] == "inet6" else words[2:-1]  # the label is the last word
            if address and "tentative" not in flags and "dadfailed" not in flags:
                temporary = "temporary" in flags or "deprecated" in flags
                found.append(Candidate(address, interface, temporary, idle))
    return found


def parse_ifconfig(text):
    """Return candidates from ``ifconfig`` of old and new net-tools and of busybox."""
    found = []
    first = 0  # candidates on this interface
    interface = None
    idle = False
    for line in text.split("\n"):
        words = line.split()
        if words and line[:1] not in (" ", "\t"):
            # "eth0", "eth0:" or, for a second address, "eth0:1"
            interface = words[0].split(":")[0]
            idle = False
            first = len(found)
        if "flags=" in line or "MTU:" in line:  # before the addresses, or after in old versions
            idle = "RUNNING" not in line or "LOOPBACK" in line
            for each in found[first:]:
                each.idle = each.idle or idle
        for index, word in enumerate(words[:-1]):
            if word in ("inet", "inet6"):
                value = words[index + 1]
                if value == "addr:" and index + 2 < len(words):
                    value = words[index + 2]
                elif value.startswith("addr:"):
                    value = value[5:]
                address = _address(value)
                if address:
                    found.append(Candidate(address, interface, idle=idle))
    return found


def complete_names(candidates, proc):
    """Replace interface names that old net-tools cut to nine characters by the full names.

    A prefix that several names share is dropped.
    """
    lines = compat.to_text(read_bounded(proc + "/net/dev")).split("\n")
    names = [line.split(":")[0].strip() for line in lines if ":" in line]
    for each in candidates:
        if len(each.interface or "") == 9 and each.interface not in names:
            whole = [name for name in names if name.startswith(each.interface)]
            if whole:
                each.interface = whole[0] if len(whole) == 1 else None


def parse_route_get(text):
    """Return, in a list, the candidate that ``ip route get`` names as the source address."""
    named = {}
    key = None
    for word in text.split():
        if key is None and word in ("via", "dev", "src"):
            key = word
        else:
            named.setdefault(key, word)
            key = None
    address = _address(named.get("src", ""))
    return [Candidate(address, named.get("dev"))] if address else []


PARSERS = (parse_ip_address, parse_ifconfig, parse_route_get)


def _number(data):
    """Return a number from the kernel's bytes; not every guest has the module struct."""
    number = 0
    for byte in list(bytearray(data))[:: -1 if sys.byteorder == "little" else 1]:
        number = number << 8 | byte
    return number


def _field(number, size):
    """Return a number as the kernel's bytes."""
    parts = [number >> 8 * at & 255 for at in range(size)]
    return bytes(bytearray(parts[:: 1 if sys.byteorder == "little" else -1]))


def _ask_kernel(kind, body=b"\0\0\0\0", flags=_DUMP):
    """Yield the type and the content of each message that answers an rtnetlink(7) request."""
    request = _field(16 + len(body), 4) + _field(kind, 2) + _field(_REQUEST | flags, 2)
    request += _field(1, 4) + _field(0, 4) + body
    sock = socket.socket(16, socket.SOCK_RAW, 0)  # AF_NETLINK, NETLINK_ROUTE
    try:
        sock.settimeout(1.0)
        sock.send(request)
        while True:
            data = sock.recv(16384)
            if not data:
                return
            while len(data) >= 16:
                length, answer = _number(data[:4]), _number(data[4:6])
                if answer in (2, 3) or length < 16:  # NLMSG_ERROR, NLMSG_DONE
                    return
                yield answer, data[16:length]
                data = data[(length + 3) & ~3 :]
            if not flags:  # there is only one message
                return
    finally:
        sock.close()


def _attributes(data):
    """Return the attributes of a message as bytes by their number."""
    found = {}
    while len(data) >= 4:
        length = _number(data[:2])
        if length < 4:
            break
        found[_number(data[2:4])] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def read_netlink():
    """Return the kernel's own addresses and links as candidates; none if it may not be asked."""
    links = {}
    found = []
    try:
        for kind, body in list(_ask_kernel(_GETLINK)):
            if kind == _LINK and len(body) >= 16:
                hardware, index, flags = [_number(body[at:to]) for at, to in _LINK_FIELDS]
                name = compat.to_text(_attributes(body[16:]).get(3, b"").rstrip(b"\0"))
                # IFF_UP and IFF_RUNNING, but not IFF_LOOPBACK
                links[index] = (name, flags & 0x49 != 0x41, hardware not in _WIRES)
        for kind, body in list(_ask_kernel(_GETADDR)):
            if kind == _ADDRESS and len(body) >= 8:
                flags = _number(body[2:3])
                parts = _attributes(body[8:])
                packed = parts.get(2) or parts.get(1)  # IFA_LOCAL; the other may be a peer's
                # tentative and failed addresses cannot be used
                if packed and len(packed) in (4, 16) and not flags & 0x48:
                    name, idle, inner = links.get(_number(body[4:8]), (None, False, False))
                    temporary = len(packed) == 16 and bool(flags & 0x21)
                    found.append(Candidate(format_address(packed), name, temporary, idle, inner))
    except compat.SOCKET_ERRORS:
        return []
    return found


def is_own(packed):
    """Return whether the kernel delivers packets for a packed address to this machine."""
    bits = len(packed) * 8
    # struct rtmsg, and RTA_DST
    body = bytes(bytearray([2 if bits == 32 else 10, bits] + [0] * 10))
    body += _field(4 + len(packed), 2) + _field(1, 2) + packed
    try:
        for kind, route in list(_ask_kernel(_GETROUTE, body, 0)):
            return kind == _ROUTE and _number(route[7:8]) == 2  # RTN_LOCAL
    except compat.SOCKET_ERRORS:
        pass
    return False


_LINK_FIELDS = ((2, 4), (4, 8), (8, 12))  # of struct ifinfomsg: type, index and flags


def _routes(proc):
    """Yield the IPv4 routes: interface, network, gateway, flags, metric and mask, as numbers."""
    for line in compat.to_text(read_bounded(proc + "/net/route")).split("\n")[1:]:
        words = line.split()
        try:
            network, gateway, mask = [_route_number(words[at]) for at in (1, 2, 7)]
            yield words[0], network, gateway, int(words[3], 16), int(words[6]), mask
        except (IndexError, ValueError):
            pass  # not a route


def default_interfaces(proc):
    """Return the interfaces of the IPv4 and IPv6 default routes, None for a missing route.

    Of several routes the one with the lowest metric counts.
    """
    best4 = best6 = (None, None)
    for name, network, _gateway, flags, metric, mask in _routes(proc):
        if not network and not mask and flags & 0x201 == 1:  # RTF_UP, and not RTF_REJECT
            if best4[0] is None or metric < best4[0]:
                best4 = (metric, name)
    for line in compat.to_text(read_bounded(proc + "/net/ipv6_route")).split("\n"):
        words = line.split()
        if len(words) == 10 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
            metric, flags = _hexadecimal(words[5]), _hexadecimal(words[8])
            if not flags & 0x200 and (best6[0] is None or metric < best6[0]):
                best6 = (metric, words[9])
    return best4[1], best6[1]


def _hexadecimal(word):
    """Return the number, or a number of all ones if the word is invalid."""
    try:
        return int(word, 16)
    except ValueError:
        return 0xFFFFFFFF


def _ipv4_number(address):
    number = 0
    for part in address.split("."):
        number = number * 256 + int(part)
    return number


def _route_number(word):
    # The kernel prints a big-endian number as if it had its own byte order.
    number = int(word, 16)
    if sys.byteorder == "big":
        return number
    return (
        (number & 255) << 24 | (number >> 8 & 255) << 16 | (number >> 16 & 255) << 8 | number >> 24
    )


def read_kernel_tables(proc):
    """Return candidates from /proc/net/fib_trie and /proc/net/if_inet6."""
    networks = [
        (mask, network, name)
        for name, network, gateway, _flags, _metric, mask in _routes(proc)
        if mask and not gateway
    ]
    networks.sort(reverse=True)  # the narrowest network determines an address's interface
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
            on = [name for mask, network, name in networks if number & mask == network]
            found.append(Candidate(last, on[0] if on else None))
    for line in compat.to_text(read_bounded(proc + "/net/if_inet6")).split("\n"):
        words = line.split()
        # The fifth word has the flags: tentative and failed addresses cannot be used.
        if len(words) == 6 and len(words[0]) == 32 and not _hexadecimal(words[4]) & 0x48:
            groups = [words[0][at : at + 4] for at in range(0, 32, 4)]
            address = _address(":".join(groups))
            if address:
                found.append(Candidate(address, words[5], bool(int(words[4], 16) & 0x21)))
    return found


def read_kernel(proc):
    """Return the candidates from the kernel, and whether these are all.

    Tables below another directory than /proc are from another machine or a test.
    """
    found = read_netlink() if proc == "/proc" else []
    return found or read_kernel_tables(proc), bool(found)


def is_loopback(address):
    """Return whether the address reaches only the guest itself, or nothing."""
    return address.startswith("127.") or address in ("::1", "0:0:0:0:0:0:0:1", "::", "0.0.0.0")


def is_link_local(address):
    """Return whether a host assigns the address to itself (RFC 3927, RFC 4291)."""
    return address.startswith("169.254.") or address[:3] in ("fe8", "fe9", "fea", "feb")


def _rank(candidate, default4, default6):  # noqa: PLR0911 -- one for each kind
    version6 = ":" in candidate.address
    name = candidate.interface
    if is_link_local(candidate.address):
        return _HOPELESS + version6
    if candidate.address[:8] == "192.0.0." and int(candidate.address[8:]) < 8:
        return 8  # RFC 7335: the guest's end of a translation; only IPv6 leaves the guest
    if candidate.idle or name == "lo":
        return 6 + version6
    if name and name == (default6 if version6 else default4):
        return 4 if version6 else 0
    if not version6 and name and name == default6:
        return 1
    if candidate.inner or [prefix for prefix in _INNER if (name or "").startswith(prefix)]:
        return 6 + version6
    if version6:
        return 5
    return 2 if name else 3


def choose(candidates, defaults, interface=None):
    """Return the addresses to report, best first, and whether the best one is good.

    IPv4 comes before IPv6, and addresses on the default route's interface before
    others. Link-local addresses count only if there are no others, loopback addresses
    never. If ``interface`` is given, only its addresses count.
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
    """Return a value that changes with addresses and routes; it is cheap to compute."""
    names = ("/net/fib_trie", "/net/if_inet6", "/net/route")
    return hash(b"".join([read_bounded(proc + name) for name in names]))
