"""Configure a network interface: ``POST /configure-interface``.

It changes the guest, so it needs ALLOW_CONFIGURE=yes and a request with TOKEN. It needs
CAP_NET_ADMIN, and root for DHCP clients. The change lasts until the next boot; the
distribution's own configuration stays unchanged.
"""

from . import access, addresses, compat
from .tasks import Outcome, run_program

SECONDS = 5.0
DHCP_SECONDS = 45.0

# Each exits with a status other than 0 without a lease, and renews a lease in the background.
DHCP_CLIENTS = (
    ("dhclient", "-1"),
    ("dhcpcd", "-w", "-t", "30"),
    ("udhcpc", "-n", "-t", "5", "-i"),
)


class RefusalError(Exception):
    """Raised when the request cannot be fulfilled; the argument says why."""


def parse_object(text):
    """Return a JSON object (RFC 8259) as a dict. Raises RefusalError for anything else.

    Only strings, null and objects are parsed exactly, because no other values are
    needed.
    """
    try:
        value, at = _value(text, 0, 0)
        if isinstance(value, dict) and _skip(text, at) == len(text):
            return value
    except ValueError:
        pass
    raise RefusalError("the body is not a JSON object")


_NESTED = 32
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"'}


def _skip(text, at):
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _value(text, at, depth):
    """Return the value at an offset, and the offset after it. Raises ValueError."""
    at = _skip(text, at)
    head = text[at : at + 1]
    if head == '"':
        return _string(text, at + 1)
    if head in ("{", "[") and depth < _NESTED:
        return _members(text, at, depth)
    end = at
    while end < len(text) and text[end] not in '{}[]:," \t\r\n':
        end += 1
    word = text[at:end]
    # No number is needed, so anything that looks like one is skipped.
    if word not in ("true", "false", "null") and (not word or word.strip("0123456789+-.eE")):
        raise ValueError
    return None if word == "null" else 0, end


def _members(text, at, depth):
    """Return an object as a dict or an array as a list of its last member, and the end offset."""
    is_object = text[at] == "{"
    found = {}
    closing = "}" if is_object else "]"
    at = _skip(text, at + 1)
    while text[at : at + 1] != closing or found:
        key = ""
        if is_object:
            if text[at : at + 1] != '"':
                raise ValueError
            key, at = _string(text, at + 1)
            at = _skip(text, at)
            if text[at : at + 1] != ":":
                raise ValueError
            at += 1
        found[key], at = _value(text, at, depth + 1)
        at = _skip(text, at)
        if text[at : at + 1] == closing:
            break
        if text[at : at + 1] != ",":
            raise ValueError
        at = _skip(text, at + 1)
    return found if is_object else list(found), at + 1


def _string(text, at):
    out = []
    while text[at : at + 1] != '"':
        character = text[at : at + 1]
        if character < " ":  # or the end of the text
            raise ValueError
        at += 1
        if character == "\\":
            character = text[at : at + 1]
            at += 1
            if character == "u":
                code = text[at : at + 4]
                if len(code) < 4 or code.strip("0123456789abcdefABCDEF"):
                    raise ValueError
                at += 4
                # No valid value has other characters.
                character = chr(int(code, 16)) if int(code, 16) < 127 else "?"
            elif character not in _ESCAPES:
                raise ValueError
            else:
                character = _ESCAPES[character]
        out.append(character)
    return "".join(out), at + 1


def parse_interface(name, root):
    """Return the name of an existing interface of this guest. Raises RefusalError."""
    if not name or len(name) > 15 or name[0] in "-." or [c for c in name if c not in _NAME]:
        raise RefusalError("interface is not the name of one")
    if not compat.exists("%s/sys/class/net/%s" % (root, name)):
        raise RefusalError("there is no interface %s" % name)
    return name


_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


def parse_cidr(text):
    """Return an address and its prefix length: ``("192.0.2.7", 24)``. Raises RefusalError."""
    address, _slash, length = text.partition("/")
    packed = compat.pack_address(address)
    if packed is None or not compat.is_digits(length) or not 0 < int(length) <= len(packed) * 8:
        raise RefusalError("static_ip is not ADDRESS/PREFIX")
    if not bytearray(packed)[0] or bytearray(packed)[0] in (127, 255):
        raise RefusalError("static_ip is not an address for an interface")
    return addresses.format_address(packed), int(length)


def parse_gateway(text, address, length):
    """Return a gateway that the kernel accepts for an address. Raises RefusalError."""
    own, packed = compat.pack_address(address), compat.pack_address(text)
    if packed is None or len(packed) != len(own):
        raise RefusalError("gateway is not an address of the same kind")
    network = access.parse_allow("%s/%d" % (address, length))
    near = network + access.parse_allow("fe80::/10")
    host = 1  # not the network's own address or its broadcast address
    if len(packed) == 4 and length < 31:
        number = 0
        for byte in bytearray(packed):
            number = number << 8 | byte
        last = (1 << (32 - length)) - 1
        host = number & last if number & last != last else 0
    if packed == own or not host or not [each for each in near if access.is_in(each, packed)]:
        raise RefusalError("gateway is not another address in its network")
    return addresses.format_address(packed)


def configure(body, root, outcome, clock):
    """Carry out a request; ``outcome.output`` is then the answer.

    If it fails, addresses and routes stay as they were, or are restored.
    """
    try:
        wanted = parse_object(compat.to_text(body))
        _check_kinds(wanted)
        answer = {"success": True, "interface": parse_interface(wanted.get("interface"), root)}
        is_static = wanted.get("static_ip") or wanted.get("gateway")
        yield (_set_static if is_static else _ask_dhcp)(wanted, answer, clock)
    except RefusalError as refused:
        answer = {"success": False, "error": refused.args[0]}
    outcome.output = answer


def _check_kinds(wanted):
    for key in ("interface", "static_ip", "gateway"):
        if wanted.get(key) is not None and not isinstance(wanted[key], str):
            raise RefusalError("%s is neither a string nor null" % key)


def _set_static(wanted, answer, clock):
    address, length = parse_cidr(wanted.get("static_ip") or "")
    gateway = wanted.get("gateway") or None
    if gateway:
        gateway = parse_gateway(gateway, address, length)
    name, cidr = answer["interface"], "%s/%d" % (address, length)
    answer.update({"mode": "static", "ip": cidr, "gateway": gateway})
    ran = Outcome()
    yield run_program(("ip", "link", "set", "dev", name, "up"), SECONDS, ran, clock)
    if ran.status == 127:
        yield _set_by_ifconfig(name, address, length, gateway, clock)
    else:
        yield _set_by_ip(name, cidr, gateway, clock)


def _set_by_ip(name, cidr, gateway, clock):
    """Add the new address before removing the old one, so that a refusal changes nothing."""
    ip = ("ip", "-6" if ":" in cidr else "-4")
    device = ("dev", name)
    before = Addresses(ip, name)
    new = [ip + ("addr", "replace", cidr) + device]
    if gateway:
        new.append(ip + ("route", "replace", "default", "via", gateway) + device)
    yield before.read(clock)
    others = [each for each in before.addresses if each[0] != cidr and each[0][:3] != "fe8"]
    failure = []
    yield _run_all(new, clock, failure)
    if not failure:
        yield _run_all([ip + ("addr", "del", each[0]) + device for each in others], clock)
        # The kernel may have removed the address with the first one of its network.
        yield _run_all(new, clock, failure)
    if failure:
        gone = [ip + ("addr", "del", cidr) + device]
        if cidr in [each[0] for each in before.addresses]:
            gone = []
        if gateway:
            gone.insert(0, ip + ("route", "del", "default", "via", gateway) + device)
        yield _run_all(gone + before.commands(), clock)
        raise RefusalError(failure[0])


class Addresses(object):
    """An interface's addresses and routes from ``ip``, to restore them."""

    def __init__(self, ip, name):
        self.addresses = []  # each followed by its broadcast address, as ``ip`` takes it
        self._ip = ip
        self._device = ("dev", name)
        self._routes = []

    def read(self, clock):
        ran = Outcome()
        yield run_program(self._ip + ("addr", "show") + self._device, SECONDS, ran, clock)
        for line in compat.to_text(ran.output).split("\n"):
            words = tuple(line.split())
            if words[:1] in (("inet",), ("inet6",)) and words[1:]:
                broadcast = words[2:4] if words[2:3] == ("brd",) else ()
                self.addresses.append(words[1:2] + broadcast)
        ran = Outcome()
        yield run_program(self._ip + ("route", "show"), SECONDS, ran, clock)
        for line in compat.to_text(ran.output).split("\n"):
            words = line.split()
            for passing in ("linkdown", "dead"):
                if passing in words:
                    words.remove(passing)
            if "expires" in words:
                at = words.index("expires")
                del words[at : at + 2]
            # The kernel adds routes of addresses again by itself.
            if words and line[:1] != "\t" and "kernel" not in words:
                if words[0] == "default" or self._device[1] in words:
                    self._routes.append(tuple(words))

    def commands(self):
        """Return the commands that restore all of them."""
        add, via = self._ip + ("addr", "replace"), self._ip + ("route", "replace")
        commands = [add + each + self._device for each in self.addresses]
        return commands + [via + each for each in self._routes]


def _set_by_ifconfig(name, address, length, gateway, clock):
    """Replace the first IPv4 address; restore it if that fails."""
    if ":" in address:
        raise RefusalError("IPv6 addresses need ip, which this guest does not have")
    number = (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF
    mask = ".".join([str(number >> shift & 255) for shift in (24, 16, 8, 0)])
    shown, routes, failure = Outcome(), Outcome(), []
    yield run_program(("ifconfig", name), SECONDS, shown, clock)
    yield run_program(("route", "-n"), SECONDS, routes, clock)
    words = compat.to_text(shown.output).replace(":", " ").split()  # "addr:" in old versions
    before = ("ifconfig", name)
    for word, value in zip(words, words[1:]):
        if word in ("inet", "addr") and len(before) == 2 and addresses.is_ipv4(value):
            before += (value,)
        elif word in ("Mask", "netmask") and len(before) == 3:
            before += ("netmask", value)
    if len(before) == 2:
        before += ("0.0.0.0",)
    lost = [line.split() for line in compat.to_text(routes.output).split("\n")]
    lost = [words for words in lost if words[:1] == ["0.0.0.0"] and words[-1] == name]
    new = [("ifconfig", name, address, "netmask", mask, "up")]
    back = [before] + [("route", "add", "default", "gw", words[1], name) for words in lost]
    if gateway:
        new.append(("route", "add", "default", "gw", gateway, name))
        yield _run_all([("route", "del", "default", "gw", gateway, name)], clock)
    yield _run_all(new, clock, failure)
    if failure:
        yield _run_all(back, clock)
        raise RefusalError(failure[0])


def _run_all(commands, clock, failure=None):
    """Run the commands in order. With a list for the first failure, stop there; else continue."""
    for argv in commands:
        ran = Outcome()
        yield run_program(argv, SECONDS, ran, clock)
        if ran.status != 0 and failure is not None:
            failure.append("%s failed: %s" % (" ".join(argv), ran.failure or ran.status))
            break


def _ask_dhcp(_wanted, answer, clock):
    name, ran = answer["interface"], Outcome()
    answer["mode"] = "dhcp"
    before = Addresses(("ip", "-4"), name)
    yield before.read(clock)
    yield run_program(("ip", "link", "set", "dev", name, "up"), SECONDS, ran, clock)
    for argv in DHCP_CLIENTS:
        ran = Outcome()
        yield run_program(argv + (name,), DHCP_SECONDS, ran, clock)
        if ran.status == 0:
            answer["dhcp_client"] = argv[0]
            return
        if ran.status != 127:
            yield _run_all(before.commands(), clock)  # the DHCP client may have removed them
            raise RefusalError("%s got no lease for %s" % (argv[0], name))
    raise RefusalError("this guest has neither dhclient, dhcpcd nor udhcpc")
