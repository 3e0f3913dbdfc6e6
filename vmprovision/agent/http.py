"""The subset of HTTP/1.1 (RFC 9110, RFC 9112) for a server of small JSON answers."""

import time

from . import compat, jsonio

LINE_LIMIT = 4096
HEAD_LIMIT = 8192
BODY_LIMIT = 65536
ORDER_LIMIT = 4096  # bytes kept of a body
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = "application/json"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"  # the format that Prometheus reads
# Version 1.0.0 allows more names, which are not used here, and ways to write them.
_EXPOSITION_PARAMETERS = ("version=0.0.4", "version=1.0.0", "charset=utf-8")
RANGE_LIMIT = 32  # entries in an Accept header; others are ignored

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

_ALPHANUMERIC = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKEN = frozenset(bytearray(b"!#$%&'*+-.^_`|~" + _ALPHANUMERIC))
_DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


class RequestError(Exception):
    """A request that cannot be parsed: ``args`` are the status to answer and the reason."""


class Request(object):
    """The head of a request: method, path as text, lists of values by lower-case field name.

    ``chunks`` parses a body in chunks; else ``body_length`` is known. ``is_waiting`` is
    set if the client waits for an interim answer before it sends the body.
    """

    def __init__(self, method, path, fields, is_old):
        self.method = method
        self.path = path
        self.fields = fields
        self.is_old = is_old
        self.keep_alive = not is_old
        self.body_length = 0
        self.chunks = None
        self.is_waiting = False


class Chunks(object):
    """Parse a body in chunks (RFC 9112, section 7.1) as it arrives, and keep its beginning.

    ``size`` counts all received bytes, including the chunks' heads and trailers.
    """

    def __init__(self):
        self.body = b""
        self.size = 0
        self.is_whole = False
        self._left = 0  # bytes left in the chunk
        self._next = "size"

    def take(self, data):
        """Return the part of the data after the body. Raises RequestError."""
        while data and not self.is_whole:
            if self._left:
                piece = data[: self._left]
                self._left -= len(piece)
                self.body = (self.body + piece)[: ORDER_LIMIT + 1]
            else:
                at = data.find(b"\n") + 1
                piece = data[:at]
                if max(at, len(data) if not at else 0) > LINE_LIMIT:
                    raise RequestError(400, "malformed chunk")
                if not at:
                    break
                self._take_line(piece)
            data = data[len(piece) :]
            self.size += len(piece)
            if self.size + self._left > BODY_LIMIT:
                raise RequestError(413, "request body too long")
        return data

    def _take_line(self, line):
        line, end = line[:-2], line[-2:]
        size = line.partition(b";")[0].strip(b" \t")
        if end != b"\r\n" or (self._next == "end" and line):
            raise RequestError(400, "malformed chunk")
        if self._next == "end":
            self._next = "size"
        elif self._next == "trailers":
            self.is_whole = not line
        elif not size or len(size) > 8 or size.strip(b"0123456789abcdefABCDEF"):
            raise RequestError(400, "malformed chunk")
        else:
            self._left = int(compat.to_text(size), 16)
            self._next = "end" if self._left else "trailers"


def take_head(data):
    """Return the first request head in the data and the rest; ``(None, data)`` if incomplete.

    Line ends may be a bare LF, and empty lines before the request line are
    dropped (RFC 9112, section 2.2). Raises RequestError beyond the limits.
    """
    data = data.lstrip(b"\r\n")
    if data and bytearray(data[:1])[0] not in _TOKEN:  # probably TLS, so do not wait for its end
        raise RequestError(400, "malformed request line")
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
    """Return the Request a head describes. Raises RequestError if it is malformed."""
    lines = [line[:-1] if line.endswith(b"\r") else line for line in head.split(b"\n")]
    method, target, is_old = _parse_request_line(lines[0])
    fields = _parse_fields(lines[1:])
    hosts = fields.get(b"host", [])
    if len(hosts) > 1 or not (hosts or is_old):
        raise RequestError(400, "exactly one Host is required")
    if hosts and not _is_host(hosts[0]):
        raise RequestError(400, "malformed header field")
    request = Request(method, _path_of(target), fields, is_old)
    codings = _list_of(fields, b"transfer-encoding")
    if codings:
        if is_old or b"content-length" in fields:
            raise RequestError(400, "malformed Transfer-Encoding")
        if codings != [b"chunked"]:
            raise RequestError(501, "transfer coding is not supported")
        request.chunks = Chunks()
    request.body_length = _body_length(fields.get(b"content-length", ()))
    expected = [] if is_old else _list_of(fields, b"expect")  # RFC 9110, section 10.1.1
    if [each for each in expected if each != b"100-continue"]:
        raise RequestError(417, "expectation is not supported")
    request.is_waiting = bool(expected and (request.chunks or request.body_length))
    options = _list_of(fields, b"connection")
    request.keep_alive = b"close" not in options and (not is_old or b"keep-alive" in options)
    return request


def _list_of(fields, name):
    """Return the members of a list field, in lower case."""
    members = b",".join(fields.get(name, ())).lower().split(b",")
    return [member.strip(b" \t") for member in members if member.strip(b" \t")]


def _is_host(value):
    """Return whether it is an authority without a user (RFC 3986, section 3.2); it may be empty."""
    name, port = value, b""
    if value[:1] == b"[":
        name, closing, port = value[1:].partition(b"]")
        packed = compat.pack_address(compat.to_text(name.split(b"%")[0]))  # also with a zone
        if not closing or port[:1] not in (b"", b":") or len(packed or ()) != 16:
            return False
        name, port = b"", port[1:]
    elif b":" in value:
        name, _, port = value.partition(b":")
    escapes = [part[:2] for part in name.split(b"%")[1:]]
    if [each for each in escapes if len(each) < 2 or each.strip(b"0123456789abcdefABCDEF")]:
        return False
    return not name.strip(b"-._~%!$&'()*+,;=" + _ALPHANUMERIC) and not port.strip(b"0123456789")


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
    """Return the path of a target in origin form, or in the absolute form of proxies."""
    target = target.split(b"?")[0].split(b"#")[0]
    lowered = target.lower()
    for scheme in (b"http://", b"https://"):
        if lowered.startswith(scheme):
            return compat.to_text(b"/" + target[len(scheme) :].partition(b"/")[2])
    return compat.to_text(target)


def likes_exposition(values):
    """Return whether an Accept header prefers Prometheus' text to JSON.

    By RFC 9110, section 12.5.1. A type that matches no range is not wanted. Without a
    header, and if both are equally wanted, the answer is JSON. But a client that names
    any format of Prometheus, even one that is not supported here, cannot use JSON.
    """
    ranges = []
    for each in compat.to_text(b",".join(values)).lower().split(",", RANGE_LIMIT)[:RANGE_LIMIT]:
        parts = [part.replace('"', "").replace(" ", "").strip() for part in each.split(";")]
        qualities = [_thousandths(part[2:]) for part in parts[1:] if part[:2] == "q="]
        wanted = [
            part for part in parts[1:] if part and part[:2] != "q=" and part[:9] != "escaping="
        ]
        ranges.append((parts[0], wanted, qualities[-1] if qualities else 1000))
    text = _welcome(ranges, "text/plain", _EXPOSITION_PARAMETERS)
    json = _welcome(ranges, JSON, ())
    return text > json or (text == json and bool([each for each in ranges if _is_scrape(each)]))


def _welcome(ranges, kind, parameters):
    """Return the quality that the most specific matching range gives to a type; 0 for none."""
    names = {kind: 2, kind.split("/")[0] + "/*": 1, "*/*": 0}
    best = (-1, 0)
    for name, wanted, quality in ranges:
        if name in names and not [part for part in wanted if part not in parameters]:
            best = max(best, (names[name] + len(wanted), quality))
    return best[1]


def _is_scrape(entry):
    name, wanted, quality = entry
    if not quality:
        return False
    if name == "text/plain":
        return bool([part for part in wanted if part[:8] == "version="])
    return name == "application/openmetrics-text" or (
        name == "application/vnd.google.protobuf"
        and "proto=io.prometheus.client.metricfamily" in wanted
    )


def _thousandths(text):
    whole, _, decimals = text.partition(".")
    if whole not in ("0", "1") or decimals.strip("0123456789") or len(decimals) > 3:
        return 0  # an invalid quality value: not wanted
    return min(1000, int(whole + (decimals + "000")[:3]))


class Stream(object):
    """An answer of another type than JSON, in pieces that are made while it is sent."""

    def __init__(self, kind, pieces):
        self.kind = kind
        self.pieces = pieces


def chunk(data):
    """Return a chunk of a body of unannounced length; an empty one ends the body."""
    return compat.to_bytes("%x\r\n" % len(data)) + data + b"\r\n"


def _date(now):
    """Return a time in the form of a Date field (RFC 9110, section 5.6.7)."""
    year, month, day, hour, minute, second, weekday = tuple(time.gmtime(now))[:7]
    date = _DAYS[weekday], day, _MONTHS[month - 1], year, hour, minute, second
    return "%s, %02d %s %04d %02d:%02d:%02d GMT" % date


def render(status, answer, request=None, keep_alive=False, allow=None):
    """Return a response with a JSON body as bytes; for HEAD, without the body.

    For a Stream, also without the body.
    """
    lines = ["HTTP/1.1 %d %s" % (status, REASONS[status]), "Cache-Control: no-store"]
    lines.append("Date: " + _date(int(time.time())))
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
