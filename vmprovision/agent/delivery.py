"""Delivers one address report to the manager: over a socket, or for https by curl or wget."""

from . import __version__, compat, jsonio
from .compat import socket
from .tasks import Outcome, pauses, run_program

SECONDS = 5.0
ANSWER_LIMIT = 4096
_UNRESERVED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~"


def quote(text):
    """The text percent-encoded as one segment of a path (RFC 3986)."""
    if text in (".", ".."):  # would be removed as segments
        return text.replace(".", "%2E")
    out = [
        chr(byte) if chr(byte) in _UNRESERVED else "%%%02X" % byte
        for byte in bytearray(compat.to_bytes(text))
    ]
    return "".join(out)


def report_path(settings):
    """The path a report goes to, with the manager's prefix."""
    return "%s/v1/vms/%s/guest-ip" % (settings.manager.prefix, quote(settings.vm_id))


def render_report(settings, address):
    """The bytes of the HTTP request that reports an address."""
    body = jsonio.dumps({"guest_ip": address})
    lines = [
        "POST %s HTTP/1.1" % report_path(settings),
        "Host: " + settings.manager.authority(),
        "User-Agent: guest-agent/" + __version__,
        "Content-Type: application/json",
        "Content-Length: %d" % len(body),
        "Connection: close",
    ]
    if settings.token:
        lines.append("Authorization: Bearer " + settings.token)
    return compat.to_bytes("\r\n".join(lines) + "\r\n\r\n" + body)


def parse_status(data):
    """The final status of an HTTP answer, None while it is incomplete, 0 if it is not HTTP."""
    while data:
        line, newline, rest = data.partition(b"\n")
        if not newline:
            return None if len(data) < ANSWER_LIMIT else 0
        words = line.split()
        if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
            return 0
        status = int(words[1])
        if status < 100 or status >= 200:
            return status
        # An interim answer (RFC 9110, section 15.2): the final one follows its head.
        ends = [at for at in (rest.find(b"\r\n\r\n") + 4, rest.find(b"\n\n") + 2) if at > 3]
        if rest.startswith(b"\r\n"):
            ends.append(2)
        if not ends:
            return None
        data = rest[min(ends) :]
    return None


def deliver_by_socket(settings, address, targets, outcome, clock):
    """Posts the report to the first of the targets that takes the connection.

    All of them together have five seconds.
    """
    end = clock() + SECONDS
    for place, target in enumerate(targets):
        share = max(0.0, end - clock()) / (len(targets) - place)
        outcome.failure = None
        for pause in _post(target, render_report(settings, address), share, outcome, clock):
            yield pause
        if outcome.status is not None:
            break
    if outcome.status is not None:
        outcome.failure = _judge(outcome.status)
    elif outcome.failure is None:
        outcome.failure = "the manager has no address"


def _judge(status):
    if 200 <= status <= 299:
        return None
    return "the manager answered %d" % status if status else "the manager does not speak HTTP"


def _post(target, request, seconds, outcome, clock):
    """Sends one request and waits for the answer's status, by trying again after each rest."""
    sock = socket.socket(target[0], socket.SOCK_STREAM)
    received = b""
    try:
        compat.close_on_exec(sock)
        sock.setblocking(False)
        try:
            sock.connect(target[1])
        except compat.SOCKET_ERRORS as error:
            if compat.errno_of(error) not in (compat.EINPROGRESS, compat.EINTR):
                raise
        for pause in pauses(seconds, clock):
            yield pause
            try:
                # While the connection is being made, sending says EAGAIN.
                while request:
                    request = request[sock.send(request) :]
                data = sock.recv(1024)
            except compat.SOCKET_ERRORS as error:
                if compat.errno_of(error) in (compat.EAGAIN, compat.EINTR):
                    continue
                raise
            received += data
            outcome.status = parse_status(received)
            if outcome.status is not None:
                return
            if not data:
                outcome.failure = "the manager closed the connection without an answer"
                return
        outcome.failure = "no answer in %.1f s" % SECONDS
    except compat.SOCKET_ERRORS as error:
        outcome.failure = compat.describe_error(error)
    finally:
        sock.close()


def _quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def programs(settings, address):
    """The ``(argv, input)`` pairs to try for https, in order.

    What is secret goes through the input: arguments are visible to every
    user of the guest. The wget of busybox takes only arguments, so it is
    tried only if there is no token.
    """
    url = "%s://%s%s" % (
        settings.manager.scheme,
        settings.manager.authority(),
        report_path(settings),
    )
    body = jsonio.dumps({"guest_ip": address})
    headers = ["Content-Type: application/json"]
    if settings.token:
        headers.append("Authorization: Bearer " + settings.token)
    curl = ["url = " + _quoted(url), "data = " + _quoted(body), 'output = "/dev/null"']
    curl += ["header = " + _quoted(header) for header in headers]
    curl += ['write-out = "%{http_code}"']
    wget = ["header = " + header for header in headers] + ["post_data = " + body]
    seconds = "%d" % SECONDS
    tried = [
        (("curl", "-q", "-fsS", "-m", seconds, "-K", "-"), curl),
        (
            ("wget", "--config=/dev/stdin", "-q", "--max-redirect=0", "-t", "1")
            + ("-T", seconds, "-O", "/dev/null", url),
            wget,
        ),
    ]
    if not settings.token:
        busybox = ("wget", "-q", "-O", "/dev/null", "--header", headers[0])
        tried.append((busybox + ("--post-data", body, url), []))
    return [
        (argv, compat.to_bytes("".join([line + "\n" for line in lines]))) for argv, lines in tried
    ]


def deliver_by_program(settings, address, outcome, clock):
    """Posts the report with the first of curl and wget that the guest has."""
    for argv, stdin in programs(settings, address):
        ran = Outcome()
        for pause in run_program(argv, SECONDS + 1, ran, clock, stdin):
            yield pause
        code = ran.output.strip()
        if ran.status is None:
            outcome.failure = "%s: no answer in %.1f s" % (argv[0], SECONDS)
            return
        if argv[0] == "curl" and code.isdigit() and int(code):
            outcome.failure = _judge(int(code))
            return
        if argv[0] == "wget" and ran.status == 0:
            outcome.failure = None
            return
        outcome.failure = "%s ended with status %d" % (argv[0], ran.status)
        if ran.status not in (1, 2, 127):  # not there, or an option it does not know
            return
    if outcome.failure.endswith(" 127"):
        outcome.failure = "https needs curl or wget"
