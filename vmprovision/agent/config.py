"""The agent's configuration file: ``KEY=VALUE`` lines, comments, and quotes around values."""

import os

from . import access, compat
from .delivery import quote
from .files import open_to_read, read_bounded

DEFAULT_PATH = "/etc/guest-agent.conf"
SIZE_LIMIT = 64 * 1024
UNKNOWN_LIMIT = 20  # keys that are logged
DEFAULT_PORT = 8080
KEYS = ("VM_ID", "MANAGER_URL", "PORT", "LISTEN", "TOKEN", "READ_TOKEN", "ALLOW")
KEYS += ("ALLOW_CONFIGURE", "INTERFACE", "LOG_FILE")
ANY_CID = 0xFFFFFFFF
SOURCE = "configuration"  # what /info calls this file


class Settings(object):
    """The settings; None for a setting that the configuration lacks.

    ``identity`` has the text of VM_ID and MANAGER_URL by their names in lower case,
    with the source of each.
    """

    def __init__(self):
        nowhere = {"value": None, "source": None}
        self.identity = {"vm_id": nowhere, "manager_url": nowhere}
        self.vm_id = None
        self.manager = None
        self.port = DEFAULT_PORT
        self.listen = []
        self.token = None
        self.read_token = None
        self.allow = None
        self.configure = False
        self.interface = None
        self.log_file = None


class Url(object):
    """The parts of a manager's URL; ``host`` has no brackets, ``prefix`` no trailing slash."""

    def __init__(self, scheme, host, port, prefix):
        self.scheme = scheme
        self.host = host
        self.port = port
        self.prefix = prefix

    def authority(self):
        """Return host and port in the form of a Host header and a URL."""
        host = "[%s]" % self.host.split("%")[0] if ":" in self.host else self.host
        default = {"http": 80, "https": 443}[self.scheme]
        return host if self.port == default else "%s:%d" % (host, self.port)


def is_out_of_reach(path):
    """Return whether the file exists but this process may not read it."""
    return _fault(path) == compat.EACCES


def _fault(path):
    """Return the error number of opening a file, or None."""
    try:
        os.close(open_to_read(path))
    except OSError as error:
        return compat.errno_of(error)
    return None


def find_user(name):
    """Return the (uid, gid) of a user by passwd(5); 65534 (nobody) if there is no such user."""
    for line in compat.to_text(read_bounded("/etc/passwd", SIZE_LIMIT)).split("\n"):
        fields = line.split(":")
        if len(fields) > 3 and fields[0] == name:
            if compat.is_digits(fields[2]) and compat.is_digits(fields[3]):
                return int(fields[2]), int(fields[3])
    return 65534, 65534


def read_settings(path, log):
    """Return the settings of a file; log each invalid value and use its default.

    A missing file gives the defaults. If the agent may not read the file (systemd's
    DynamicUser=), it uses the bytes that ``identify`` has handed over. Without those,
    it uses the environment's values, each read like a line of the file.
    """
    if is_out_of_reach(path):
        log.info("%s may not be read: using the environment" % path)
        data = take_over()
        if not data:
            pairs = [(key, compat.to_bytes(compat.getenv(key) or "")) for key in KEYS]
            return parse_settings([(key, _unquote(value)) for key, value in pairs], log)
        return parse_settings(parse_pairs(data, log), log)
    fault = _fault(path)
    if fault is not None:
        log.info("no configuration: %s: %s" % (path, os.strerror(fault)))
        return Settings()
    if os.stat(compat.to_path(path))[0] & 0xF000 != 0x8000:
        log.warning("no configuration: %s is not a file" % path)
        return Settings()
    return parse_settings(parse_pairs(_read(path), log), log)


def _read(path):
    return read_bounded(path, SIZE_LIMIT + 1)


def hand_over(path):
    """Return the file as lines of an EnvironmentFile= that every parser reads in the same way.

    systemd.exec(5) would keep a comment after a value and remove backslashes. A
    variable has at most 128 KB (execve(2)).
    """
    data = _read(path)
    pieces = [quote(data[at : at + 20000]) for at in range(0, len(data), 20000)]
    return ["%s%d='%s'\n" % (_VARIABLE, number, piece) for number, piece in enumerate(pieces)]


_VARIABLE = "GUEST_AGENT_FILE"


def take_over():
    """Return the bytes that ``hand_over`` put into the environment, if it did."""
    data = bytearray()
    number = 0
    while True:
        piece = compat.getenv("%s%d" % (_VARIABLE, number))
        if piece is None:
            return bytes(data)
        at = 0
        while at < len(piece):
            end = piece.find("%", at)
            end = len(piece) if end < 0 else end
            data.extend(compat.to_bytes(piece[at:end]))
            if end < len(piece):
                data.append(int(piece[end + 1 : end + 3], 16))
            at = end + 3
        number += 1


def parse_pairs(data, log):
    """Yield the ``(key, value)`` pairs of a configuration file's bytes, in order.

    One line at a time, because a small heap has no room for all of them. Only ASCII's
    white space counts, because interpreters differ in others.
    """
    if len(data) > SIZE_LIMIT:
        log.warning("configuration: only the first %d bytes are read" % SIZE_LIMIT)
        data = data[: data.rfind(b"\n", 0, SIZE_LIMIT) + 1]
    at = 3 if data.startswith(b"\xef\xbb\xbf") else 0  # the byte order mark that some editors write
    number = 0
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        line = data[at:end].strip()  # including a carriage return
        at = end + 1
        number += 1
        if not line or line.startswith(b"#"):
            continue
        key, equals, value = line.partition(b"=")
        words = key.split()
        if words[:1] == [b"export"]:
            words = words[1:] or words
        if equals:
            yield compat.to_text(b" ".join(words)), _unquote(value)
        else:
            log.limited("configuration line %d is not KEY=VALUE: ignored" % number)


def _unquote(value):
    """Return the text between quotes, or the text before a comment."""
    value = value.strip()
    if value[:1] in (b'"', b"'"):
        end = value.find(value[:1], 1)
        if end > 0:
            return compat.to_text(value[1:end])
    if value.startswith(b"#"):
        return ""
    return compat.to_text(value.split(b" #")[0].split(b"\t#")[0].rstrip())


_CLOSED = {"ALLOW": [], "READ_TOKEN": ""}  # contains no address, and equals nothing


def parse_settings(pairs, log):
    """Return the settings in pairs; the last value of a key counts, an empty one means unset."""
    settings = Settings()
    parsers = {
        "VM_ID": ("vm_id", parse_vm_id),
        "MANAGER_URL": ("manager", parse_url),
        "PORT": ("port", parse_port),
        "LISTEN": ("listen", parse_listen),
        "TOKEN": ("token", parse_token),
        "READ_TOKEN": ("read_token", parse_token),
        "ALLOW": ("allow", access.parse_allow),
        "ALLOW_CONFIGURE": ("configure", parse_flag),
        "INTERFACE": ("interface", parse_token),
        "LOG_FILE": ("log_file", parse_word),
    }
    unknown = set()
    for key, value in pairs:
        if key not in parsers:
            if len(unknown) < UNKNOWN_LIMIT:
                unknown.add(key)
                log.changed("unknown " + key, "configuration key %s is unknown: ignored" % key)
        elif value:
            name, parse = parsers[key]
            try:
                setattr(settings, name, parse(value))
                if key.lower() in settings.identity:
                    settings.identity[key.lower()] = {"value": value, "source": SOURCE}
            except (ValueError, MemoryError) as error:
                if key in _CLOSED:  # an invalid restriction must not let everybody in
                    setattr(settings, name, _CLOSED[key])
                # The value itself stays out of the log: it may be the token.
                reason = error.args[0] if isinstance(error, ValueError) else "is too long"
                log.warning("configuration: %s %s: ignored" % (key, reason))
    return settings


def parse_word(value):
    """Return the text, if it has no control characters."""
    if not value or min(compat.code_points(value)) < 32:
        raise ValueError("is empty or has control characters")
    return value


def parse_token(value):
    """Return the text, if it is printable ASCII without spaces."""
    if [code for code in compat.code_points(value) if not 33 <= code <= 126]:
        raise ValueError("is not printable ASCII without spaces")
    return value


def parse_flag(value):
    """Return True for yes, False for no."""
    if value not in ("yes", "no"):
        raise ValueError("is neither yes nor no")
    return value == "yes"


def parse_outside(value):
    """Return bytes or text as text, if it is short printable ASCII without quotes.

    For values from outside the configuration. Bytes that cannot be decoded have no
    clear meaning: clones could share a name in which they were replaced.
    """
    codes = bytearray(compat.to_bytes(value))
    if len(codes) > 1024 or [code for code in codes if code in (34, 39, 92)]:
        raise ValueError("is too long or has quotes or backslashes")
    if [code for code in codes if not 32 <= code <= 126]:
        raise ValueError("is not printable ASCII")
    return compat.to_text(value)


def parse_vm_id(value):
    """Return the text if it has at most 128 characters, counted by their first bytes in UTF-8."""
    if len([1 for byte in bytearray(compat.to_bytes(value)) if byte & 0xC0 != 0x80]) > 128:
        raise ValueError("is longer than 128 characters")
    return parse_word(value)


def parse_port(value):
    """Return a TCP port from 0 (let the kernel choose) to 65535."""
    if not compat.is_digits(value) or len(value) > 5 or int(value) > 65535:
        raise ValueError("is not a port number")
    return int(value)


def parse_host(value):
    """Return a host name or address, without the brackets of an IPv6 literal."""
    if value.startswith("[") and value.endswith("]"):
        value = value[1:-1]
    if not value or value.startswith("-") or [c for c in "/?#@[]\"'\\<>" if c in value]:
        raise ValueError("is not a host name or address")
    return parse_token(value)


def parse_listen(value):
    """Return the listen addresses: addresses, ``unix:PATH`` and ``vsock:[CID:]PORT``."""
    addresses = value.replace(",", " ").split()
    for address in addresses:
        if address.startswith("unix:"):
            path, mode = parse_unix(address)
            if path[:1] != "/" or len(compat.to_path(path)) > 107 or not 0 <= mode <= 511:
                raise ValueError("has a Unix socket without an absolute path")
        elif address.startswith("vsock:"):
            parse_vsock(address)
        else:
            parse_host(address)
    return addresses


def parse_unix(address):
    """Return the path and the mode of ``unix:PATH`` or ``unix:PATH:MODE``, which is octal."""
    path, colon, mode = address[5:].rpartition(":")
    if not colon:
        return mode, 432  # 0660
    if not mode or mode.strip("01234567"):
        raise ValueError("has a mode that is not octal")
    return path, int(mode, 8)


def parse_vsock(address):
    """Return the context identifier and the port of ``vsock:PORT`` or ``vsock:CID:PORT``."""
    numbers = address.split(":")[1:]
    if len(numbers) > 2 or [n for n in numbers if not compat.is_digits(n) or len(n) > 10]:
        raise ValueError("has a vsock address without a port number")
    cid = int(numbers[0]) if len(numbers) > 1 else ANY_CID
    if max(cid, int(numbers[-1])) > ANY_CID:
        raise ValueError("has a vsock number beyond 32 bits")
    return cid, int(numbers[-1])


def parse_url(value):
    """Return a manager's URL: http or https, a host, optionally a port and a path."""
    scheme, mark, rest = parse_token(value).partition("://")
    scheme = scheme.lower()
    if not mark or scheme not in ("http", "https"):
        raise ValueError("is not an http:// or https:// URL")
    authority, slash, path = rest.partition("/")
    if [character for character in '@?#"\\' if character in rest]:
        raise ValueError("has a part other than host, port and path")
    host, port = authority, ""
    if authority.startswith("["):
        host, mark, port = authority[1:].partition("]")
        if not mark or ":" not in host or port[:1] not in ("", ":"):
            raise ValueError("has no valid IPv6 address in its brackets")
        port = port[1:]
    elif ":" in authority:
        host, mark, port = authority.partition(":")
    number = parse_port(port) if port else {"http": 80, "https": 443}[scheme]
    prefix = (slash + path).rstrip("/")
    return Url(scheme, parse_host(host).replace("%25", "%"), number, prefix)
