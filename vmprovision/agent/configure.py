"""Configures a network interface: what ``POST /configure-interface`` does.

It changes the guest, so it is there only with ALLOW_CONFIGURE=yes, and only for
who shows TOKEN. It needs CAP_NET_ADMIN, and root for DHCP clients. What is
asked for holds until the next boot; the distribution's own configuration stays.
"""

from . import compat
from .tasks import Outcome, run_program

SECONDS = 5.0
DHCP_SECONDS = 45.0

# Each ends with a status other than 0 if it gets no lease, and keeps one in the background.
DHCP_CLIENTS = (
    ("dhclient", "-1"),
    ("dhcpcd", "-w", "-t", "30"),
    ("udhcpc", "-n", "-t", "5", "-i"),
)


class RefusalError(Exception):
    """What was asked for cannot be done; the argument says why."""


def parse_object(text):
    """A JSON object of strings and nulls as a dict. Raises RefusalError: it is anything else."""
    found = {}
    words = _words(text.strip())
    if next(words, None) != "{":
        raise RefusalError("the body is no JSON object")
    word = next(words, None)
    while word != "}":
        colon, value = next(words, None), next(words, None)
        if not isinstance(word, _Text) or colon != ":":
            raise RefusalError("the body is no JSON object")
        if value != "null" and not isinstance(value, _Text):
            raise RefusalError("%s is neither a string nor null" % word.text)
        found[word.text] = None if value == "null" else value.text
        word = next(words, None)
        if word == ",":
            word = next(words, None)
            if word == "}":
                raise RefusalError("the body is no JSON object")
        elif word != "}":
            raise RefusalError("the body is no JSON object")
    if next(words, None) is not None:
        raise RefusalError("something follows the JSON object")
    return found


class _Text(object):
    def __init__(self, text):
        self.text = text


def _words(text):
    """The punctuation, strings and bare words of JSON; strings with escapes are not for us."""
    at = 0
    while at < len(text):
        character = text[at]
        end = at + 1
        if character == '"':
            end = text.find('"', at + 1) + 1
            if not end or "\\" in text[at:end]:
                raise RefusalError("the body has a string that does not end, or has escapes in it")
            yield _Text(text[at + 1 : end - 1])
        elif character in "{}:,":
            yield character
        elif character not in " \t\r\n":
            while end < len(text) and text[end] not in '{}:,"\t\r\n ':
                end += 1
            yield text[at:end]
        at = end


def parse_interface(name, root):
    """The name of an interface that this guest has. Raises RefusalError."""
    if not name or len(name) > 15 or name[0] in "-." or [c for c in name if c not in _NAME]:
        raise RefusalError("interface is not the name of one")
    if not compat.exists("%s/sys/class/net/%s" % (root, name)):
        raise RefusalError("there is no interface %s" % name)
    return name


_NAME = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


def parse_cidr(text):
    """An address and its prefix length, such as ``("192.0.2.7", 24)``. Raises RefusalError."""
    address, _slash, length = text.partition("/")
    packed = compat.pack_address(address)
    if packed is None or not compat.is_digits(length) or not 0 < int(length) <= len(packed) * 8:
        raise RefusalError("static_ip is not ADDRESS/PREFIX")
    if not bytearray(packed)[0] or bytearray(packed)[0] in (127, 255):
        raise RefusalError("static_ip is not an address for an interface")
    return address, int(length)


def configure(body, root, outcome, clock):
    """Does what the body of a request asks for; ``outcome.output`` is then the answer."""
    try:
        wanted = parse_object(compat.to_text(body))
        answer = {"success": True, "interface": parse_interface(wanted.get("interface"), root)}
        is_static = wanted.get("static_ip") or wanted.get("gateway")
        yield (_set_static if is_static else _ask_dhcp)(wanted, answer, clock)
    except RefusalError as refused:
        answer = {"success": False, "error": refused.args[0]}
    outcome.output = answer


def _set_static(wanted, answer, clock):
    address, length = parse_cidr(wanted.get("static_ip") or "")
    gateway = wanted.get("gateway")
    version = "-6" if ":" in address else "-4"
    if gateway and (compat.pack_address(gateway) is None or (":" in gateway) != (":" in address)):
        raise RefusalError("gateway is not an address of the same kind")
    name, cidr = answer["interface"], "%s/%d" % (address, length)
    answer.update({"mode": "static", "ip": cidr, "gateway": gateway})
    ran = Outcome()
    yield run_program(("ip", "link", "set", "dev", name, "up"), SECONDS, ran, clock)
    if ran.status == 127:
        steps = _run_all(_ifconfig_commands(name, address, length, gateway), ran, clock)
    else:
        ip = ("ip", version)
        steps = _set_by_ip(ip, name, cidr, gateway, ran, clock)
    yield steps


def _set_by_ip(ip, name, cidr, gateway, ran, clock):  # noqa: PLR0913, PLR0917 -- one call
    """Adds the address before others go, so that a refusal by the kernel changes nothing."""
    add = ip + ("addr", "replace", cidr, "dev", name)
    show = ip + ("addr", "show", "dev", name)
    yield _run_all([add, show], ran, clock)
    words = compat.to_text(ran.output).split()
    others = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("inet", "inet6")]
    commands = [
        ip + ("addr", "del", other, "dev", name)
        for other in others
        if other != cidr and other[:3] != "fe8"
    ]
    # The kernel may take the address away with the first one of its network.
    commands.append(add)
    if gateway:
        commands.append(ip + ("route", "replace", "default", "via", gateway, "dev", name))
    yield _run_all(commands, ran, clock)


def _ifconfig_commands(name, address, length, gateway):
    if ":" in address:
        raise RefusalError("IPv6 addresses need ip, which this guest does not have")
    number = (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF
    mask = ".".join([str(number >> shift & 255) for shift in (24, 16, 8, 0)])
    commands = [("ifconfig", name, address, "netmask", mask, "up")]
    if gateway:
        commands.append(("route", "add", "default", "gw", gateway, name))
    return commands


def _run_all(commands, ran, clock):
    """Runs one after the other; the outcome is the last one's. Raises RefusalError at a failure."""
    for argv in commands:
        ran.output, ran.status = b"", None
        yield run_program(argv, SECONDS, ran, clock)
        # An address that is gone already went with another one of its network.
        if ran.status != 0 and "del" not in argv:
            raise RefusalError("%s failed: %s" % (" ".join(argv), ran.status))


def _ask_dhcp(_wanted, answer, clock):
    name, ran = answer["interface"], Outcome()
    answer["mode"] = "dhcp"
    yield run_program(("ip", "link", "set", "dev", name, "up"), SECONDS, ran, clock)
    for argv in DHCP_CLIENTS:
        ran = Outcome()
        yield run_program(argv + (name,), DHCP_SECONDS, ran, clock)
        if ran.status == 0:
            answer["dhcp_client"] = argv[0]
            return
        if ran.status != 127:
            raise RefusalError("%s got no lease for %s" % (argv[0], name))
    raise RefusalError("this guest has neither dhclient, dhcpcd nor udhcpc")
