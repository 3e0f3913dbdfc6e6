"""The part of HTTP/1.1 (RFC 9110, RFC 9112) that a server of small JSON answers needs."""

from . import compat, jsonio

LINE_LIMIT = 4096
HEAD_LIMIT = 8192
BODY_LIMIT = 65536
JSON = "application/json"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"  # what Prometheus reads
RANGE_LIMIT = 32  # in an Accept header; what follows is not looked at

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKEN = frozenset(bytearray(_TOKEN))


class RequestError(Exception):
    """A request that cannot be understood: ``args`` are the status to answer and why."""


class Request(object):
    """One request's head: method, path as text, lists of values by lower-case field name."""

    def __init__(self, method, path, fields, keep_alive, is_old, body_length):  # noqa: PLR0913, PLR0917
        self.method = method
        self.path = path
        self.fields = fields
        self.keep_alive = keep_alive
        self.is_old = is_old
        self.body_length = body_length


def take_head(data):
    """The first request head in the data and the rest, or ``(None, data)`` if it is incomplete.

    Line ends may be a bare LF, and empty lines before the request line are
    dropped (RFC 9112, section 2.2). Raises RequestError beyond the limits.
    """
    data = data.lstrip(b"\r\n")
    ends = [end for end in (data.find(b"\n\r\n") + 3, data.find(b"\n\n") + 2) if end > 2]
    # find() + length is at least 3 for a real hit, because the data no longer starts with LF.
    line_end = data.find(b"\n")
    if line_end > LINE_LIMIT or (line_end < 0 and len(data) > LINE_LIMIT):
        raise RequestError(414, "request line too long")
    end = min(ends) if ends else -1
    if end > HEAD_LIMIT or (end < 0 and len(data) > HEAD_LIMIT):
        raise RequestError(431, "request head too long")
    if end < 0:
        return None, data
    return data[:end], data[end:]


def parse_head(head):
    """The Request a head describes. Raises RequestError if it is malformed."""
    lines = [line[:-1] if line.endswith(b"\r") else line for line in head.split(b"\n")]
    method, target, is_old = _parse_request_line(lines[0])
    fields = _parse_fields(lines[1:])
    if not is_old and len(fields.get(b"host", ())) != 1:
        raise RequestError(400, "exactly one Host is required")
    if b"transfer-encoding" in fields:
        if b"content-length" in fields:
            raise RequestError(400, "both Transfer-Encoding and Content-Length")
        raise RequestError(501, "transfer codings are not supported")
    body_length = _body_length(fields.get(b"content-length", ()))
    if b"expect" in fields and body_length:
        raise RequestError(417, "expectations are not supported")
    options = [
        option.strip() for option in b",".join(fields.get(b"connection", ())).lower().split(b",")
    ]
    keep_alive = b"keep-alive" in options if is_old else True
    if b"close" in options:
        keep_alive = False
    return Request(method, _path_of(target), fields, keep_alive, is_old, body_length)


def _parse_request_line(line):
    words = line.split(b" ")
    if len(words) != 3 or not words[1]:
        raise RequestError(400, "malformed request line")
    method, target, version = words
    if not _is_token(method) or min(bytearray(target)) < 33 or max(bytearray(target)) > 126:
        raise RequestError(400, "malformed request line")
    if len(version) != 8 or not version.startswith(b"HTTP/") or version[6:7] != b".":
        raise RequestError(400, "malformed HTTP version")
    if not version[5:6].isdigit() or not version[7:8].isdigit():
        raise RequestError(400, "malformed HTTP version")
    if version[5:6] != b"1":
        raise RequestError(505, "only HTTP/1.0 and HTTP/1.1 are supported")
    return method, target, version[7:8] == b"0"


def _parse_fields(lines):
    fields = {}
    for line in lines:
        if not line:
            continue
        name, colon, value = line.partition(b":")
        if not colon or not _is_token(name):
            raise RequestError(400, "malformed header field")
        value = value.strip(b" \t")
        if [byte for byte in bytearray(value) if (byte < 32 and byte != 9) or byte == 127]:
            raise RequestError(400, "control character in a header field")
        fields.setdefault(name.lower(), []).append(value)
    return fields


def _is_token(data):
    return bool(data) and not [byte for byte in bytearray(data) if byte not in _TOKEN]


def _body_length(values):
    if not values:
        return 0
    lengths = [value.strip(b" \t") for value in b",".join(values).split(b",")]
    if [length for length in lengths if length != lengths[0]] or not lengths[0].isdigit():
        raise RequestError(400, "malformed Content-Length")
    if len(lengths[0]) > 9 or int(lengths[0]) > BODY_LIMIT:
        raise RequestError(413, "request body too long")
    return int(lengths[0])


def _path_of(target):
    """The path of a target in origin form, or in the absolute form that proxies send."""
    target = target.split(b"?")[0].split(b"#")[0]
    lowered = target.lower()
    for scheme in (b"http://", b"https://"):
        if lowered.startswith(scheme):
            return compat.to_text(b"/" + target[len(scheme) :].partition(b"/")[2])
    return compat.to_text(target)


def is_preferred(values, other, usual):
    """Whether the fields of an Accept header like one kind better than the usual one.

    By RFC 9110, section 12.5.1. What fits none of the ranges is unwanted; without
    a header, and where both are as welcome, it is the usual one.
    """
    return _welcome(values, other) > _welcome(values, usual)


def _welcome(values, kind):
    """The quality that the most specific range that fits a kind gives it; 0 for none."""
    name, parameters = kind.replace(" ", "").split(";")[0], kind.replace(" ", "").split(";")[1:]
    ranges = {name: 2, name.split("/")[0] + "/*": 1, "*/*": 0}
    best = (-1, 0)
    for each in compat.to_text(b",".join(values)).lower().split(",", RANGE_LIMIT)[:RANGE_LIMIT]:
        parts = [part.strip().replace('"', "") for part in each.split(";")]
        quality, wanted = 1000, []
        for part in parts[1:]:
            if part[:2] == "q=":
                quality = _thousandths(part[2:])
            elif part:
                wanted.append(part)
        if parts[0] in ranges and not [part for part in wanted if part not in parameters]:
            best = max(best, (ranges[parts[0]] + len(wanted), quality))
    return best[1]


def _thousandths(text):
    whole, _, decimals = text.partition(".")
    if whole not in ("0", "1") or decimals.strip("0123456789") or len(decimals) > 3:
        return 0  # no quality value: nothing that was asked for
    return min(1000, int(whole + (decimals + "000")[:3]))


class Stream(object):
    """An answer of another kind than JSON, in pieces that are made while it is sent."""

    def __init__(self, kind, pieces):
        self.kind = kind
        self.pieces = pieces


def chunk(data):
    """A piece of a body whose length was not announced; an empty one ends it."""
    return compat.to_bytes("%x\r\n" % len(data)) + data + b"\r\n"


def render(status, answer, request=None, keep_alive=False, allow=None):
    """The bytes of a response with a JSON body; to HEAD, everything but the body.

    Of a Stream likewise everything but the body.
    """
    lines = ["HTTP/1.1 %d %s" % (status, REASONS[status]), "Cache-Control: no-store"]
    body = b""
    if isinstance(answer, Stream):
        lines.append("Content-Type: " + answer.kind)
        if not request.is_old:
            lines.append("Transfer-Encoding: chunked")
    else:
        body = compat.to_bytes(jsonio.dumps(answer) + "\n")
        lines += ["Content-Type: " + JSON, "Content-Length: %d" % len(body)]
    if allow:
        lines.append("Allow: " + allow)
    if status == 401:
        lines.append("WWW-Authenticate: Bearer")
    if not keep_alive:
        lines.append("Connection: close")
    elif request.is_old:
        lines.append("Connection: keep-alive")
    head = compat.to_bytes("\r\n".join(lines) + "\r\n\r\n")
    return head if request and request.method == b"HEAD" else head + body
