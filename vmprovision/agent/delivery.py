"""Deliver one address report to the manager, over a socket or with curl, wget or nc."""

from . import __version__, compat, jsonio
from .compat import socket
from .tasks import Outcome, pauses, run_program

SECONDS = 5.0
ANSWER_LIMIT = 4096
_UNRESERVED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~"


def quote(text):
    """Return the text percent-encoded as one segment of a path (RFC 3986)."""
    if text in (".", ".."):  # dot segments would be removed
        return text.replace(".", "%2E")
    out = [
        chr(byte) if chr(byte) in _UNRESERVED else "%%%02X" % byte
        for byte in bytearray(compat.to_bytes(text))
    ]
    return "".join(out)


def report_path(settings):
    """Return the path a report goes to, with the manager's prefix."""
    return "%s/v1/vms/%s/guest-ip" % (settings.manager.prefix, quote(settings.vm_id))


def render_report(settings, address):
    """Return the bytes of the HTTP request that reports an address."""
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
    """Return the final status of an HTTP answer; None if incomplete, 0 if it is not HTTP."""
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
        # An interim answer (RFC 9110, section 15.2): the final answer follows its head.
        ends = [at for at in (rest.find(b"\r\n\r\n") + 4, rest.find(b"\n\n") + 2) if at > 3]
        if rest.startswith(b"\r\n"):
            ends.append(2)
        if not ends:
            return None
        data = rest[min(ends) :]
    return None


def deliver_by_socket(settings, address, targets, outcome, clock):
    """Post the report to the first target that accepts the connection.

    All targets together have five seconds. ``outcome.hopeless`` tells whether a program
    would fail too: the manager has answered, or nothing answers at its address.
    """
    end = clock() + SECONDS
    outcome.hopeless = bool(targets)
    for place, target in enumerate(targets):
        share = max(0.0, end - clock()) / (len(targets) - place)
        outcome.failure = None
        yield post(target, render_report(settings, address), share, outcome, clock)
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


def post(target, request, seconds, outcome, clock):  # noqa: C901 -- one exchange, to its end
    """Send one request and wait for the status of the answer.

    The output is the data that has arrived by then.
    """
    sock = None
    received = b""
    try:
        sock = socket.socket(target[0], socket.SOCK_STREAM)  # fails for a disabled address family
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
                # While the connection is being made, sending fails with EAGAIN.
                while request:
                    request = request[sock.send(request) :]
                data = sock.recv(1024)
            except compat.SOCKET_ERRORS as error:
                if compat.errno_of(error) in (compat.EAGAIN, compat.EINTR):
                    continue
                raise
            received += data
            outcome.output = received
            outcome.status = parse_status(received)
            if outcome.status is not None:
                return
            if not data:
                outcome.failure = "the manager closed the connection without an answer"
                return
        outcome.failure = "no answer in %.1f s" % SECONDS
    except compat.SOCKET_ERRORS as error:
        outcome.failure = compat.describe_error(error)
        outcome.hopeless = outcome.hopeless and compat.errno_of(error) in compat.UNREACHED
    finally:
        if sock is not None:
            sock.close()


def _quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def programs(settings, address):
    """Return the ``(argv, input)`` pairs to try, in order; nc for http only.

    Secrets go through the input, because every user of the guest can see arguments.
    BusyBox's wget accepts only arguments, so it is tried only without a token.
    """
    manager = settings.manager
    url = "%s://%s%s" % (manager.scheme, manager.authority(), report_path(settings))
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
        (("curl", "-q", "-fsS", "-m", seconds, "-K", "-"), _lines(curl)),
        (
            ("wget", "--config=/dev/stdin", "-q", "--max-redirect=0", "-t", "1")
            + ("-T", seconds, "-O", "/dev/null", url),
            _lines(wget),
        ),
    ]
    if not settings.token:
        busybox = ("wget", "-q", "-O", "/dev/null", "--header", headers[0])
        tried.append((busybox + ("--post-data", body, url), b""))
    if manager.scheme == "http":
        argv = ("nc", "-w", seconds, manager.host, "%d" % manager.port)
        tried.append((argv, render_report(settings, address)))
    return tried


def _lines(lines):
    return compat.to_bytes("".join([line + "\n" for line in lines]))


def deliver_by_program(settings, address, outcome, clock):
    """Post the report with the first of curl, wget and nc that gets an answer.

    If none gets an answer, an earlier failure in the outcome stays.
    """
    failure = None
    useless = []
    for argv, stdin in programs(settings, address):
        if argv[0] in useless:
            continue
        ran = Outcome()
        yield run_program(argv, SECONDS + 1, ran, clock, stdin)
        status = _status_from(argv[0], ran)
        if status is not None:
            outcome.failure = _judge(status)
            return
        if argv[0] == "wget" and ran.status == 8:  # "server issued an error response"
            outcome.failure = "the manager refused the report"
            return
        if ran.status is None:
            text = ran.failure or "no answer in %.1f s" % SECONDS
            failure = failure or "%s: %s" % (argv[0], text)
        elif ran.status != 127:
            failure = failure or "%s ended with status %d" % (argv[0], ran.status)
        if ran.status not in (1, 2, 127):  # the program exists and knows its options
            useless.append(argv[0])
    if not outcome.failure:
        outcome.failure = failure or "https needs curl or wget"


def _status_from(program, ran):
    """Return the HTTP status that a program received, or None if it did not print one."""
    if program == "curl":
        code = ran.output.strip()
        return int(code) or None if code.isdigit() else None
    if program == "wget":
        return 200 if ran.status == 0 else None
    return parse_status(ran.output) or None
