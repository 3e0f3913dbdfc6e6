"""Examine the agent from another process: ``guest-agent check`` and ``guest-agent once``."""

import time

from . import __version__, compat, config, delivery, guest, identity, jsonio, server
from .files import read_bounded
from .log import Log, printable
from .metrics import Metrics
from .tasks import Outcome, run_program

SECONDS = 3.0
SAMPLE_SECONDS = 0.5
MANIFEST = "/usr/local/lib/guest-agent/installed"
RECEIPT = "/usr/local/lib/guest-agent/receipt.json"


def once(proc, root):
    """Print what ``GET /metrics`` answers; return the exit status."""
    clock = compat.Clock()
    metrics = Metrics(proc, root, clock)
    due = metrics.tick(clock())
    time.sleep(SAMPLE_SECONDS)  # the processor figures cover this pause
    metrics.tick(due)
    compat.print_text(jsonio.dumps(metrics.read()) + "\n")
    return 0


class _Findings(Log):
    """Print findings; a warning about the settings counts as a fault."""

    def __init__(self):
        Log.__init__(self)
        self.faults = 0

    def tell(self, subject, fault, text):
        """Print a line and count a fault; None marks a note, which is neither right nor wrong."""
        self.faults += bool(fault)
        kind = "fault" if fault else "ok" if fault is False else "note"
        compat.print_text("%-5s  %-13s  %s\n" % (kind, subject, printable(text)))

    def _write(self, level, text):
        if level != "info":
            self.tell("configuration", True, text)


def check(path, settings_of, proc, root):
    """Print whether everything that the agent needs is right; return the exit status."""
    found = _Findings()
    found.tell("agent", False, "version %s on %s" % (__version__, compat.runtime_name()))
    if config.is_out_of_reach(path):
        found.tell("configuration", True, path + " may not be read: ask as root")
    elif compat.exists(path):
        found.tell("configuration", False, path)
    else:
        found.tell("configuration", None, path + " is not there: defaults")
    settings = settings_of(found)
    identity.Identity(root, proc, found).complete(settings)
    for key, entry in sorted(settings.identity.items()):
        text = entry["value"] and "%s, from %s" % (entry["value"], entry["source"])
        found.tell(key, False if text else None, text or "not set: addresses are not reported")
    _check_port(settings, found)
    _check_service(found, proc, root)
    if settings.manager:
        _check_manager(settings.manager, found)
    return 1 if found.faults else 0


def _ask(target, request):
    """Return the outcome of an HTTP request."""
    outcome, clock = Outcome(), compat.Clock()
    _wait(delivery.post(target, compat.to_bytes(request), SECONDS, outcome, clock))
    return outcome


def look_at_port(settings):
    """Return whether something is wrong with the port, and a text; None if it is not used."""
    place = "port %d" % settings.port
    hosts = tcp_addresses(settings)
    if settings.listen and not hosts:
        return None, "listens on %s only" % ", ".join(settings.listen)
    host = hosts[0].strip("[]") if hosts else "127.0.0.1"
    request = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    token = settings.read_token or settings.token
    if token:
        request += "Authorization: Bearer %s\r\n" % token
    try:
        outcome = _ask(compat.resolve(host, settings.port)[0], request + "\r\n")
    except Exception as error:  # gaierror is not one of SOCKET_ERRORS everywhere
        return True, "%s: %s" % (host, compat.describe_error(error))
    if outcome.status == 200 and b'"healthy"' in outcome.output:
        return False, "the agent answers on %s" % place
    if outcome.status is not None:
        return True, "something else answers on %s, with %s" % (place, outcome.status)
    return True, "no agent answers on %s (%s)" % (place, outcome.failure)


def tcp_addresses(settings):
    """Return the listen addresses that are TCP addresses."""
    return [each for each in settings.listen if each[:5] != "unix:" and each[:6] != "vsock:"]


def why_not_listen(settings):
    """Return why the agent cannot listen on the port now, or None."""
    hosts = tcp_addresses(settings)
    try:
        if hosts or not settings.listen:
            for listener in server.open_listeners(hosts, settings.port):
                listener.close()
    except Exception as error:
        return compat.describe_error(error)
    return None


def _check_port(settings, found):
    fault, text = look_at_port(settings)
    if text[:8] == "no agent":
        reason = why_not_listen(settings)
        text += ", and none can listen: " + reason if reason else ""
    found.tell("port", fault, text)


def find_renamed(path, root=""):
    """Return the path, or a runlevel link's path under its current number, or None.

    update-rc.d(8) and chkconfig(8) number the links by the order of all services.
    """
    folder, _, name = path.rpartition("/")
    if compat.exists(root + path):
        return path
    try:
        for each in list(compat.list_names(root + folder)):
            if compat.is_digits(name[1:3]) and each[:1] + each[3:] == name[:1] + name[3:]:
                return "%s/%s" % (folder, each)
    except compat.FILE_ERRORS:
        pass
    return None


def _check_service(found, proc, root):
    lines = compat.to_text(read_bounded(root + MANIFEST)).split("\n")
    first = (guest.parse_process(read_bounded(proc + "/1/stat")) or {}).get("comm")
    if not lines[1:] and not compat.exists(root + RECEIPT):
        found.tell("service", None, "neither installed nor injected; process 1 is %s" % first)
        return
    how = "installed for " + lines[0] if lines[1:] else "injected"
    missing = [path for path in lines[1:] if path[:1] == "/" and not find_renamed(path, root)]
    running = agent_processes(proc)
    if missing:
        text = "%s, but %s is gone" % (how, missing[0])
    elif running:
        text = "%s, runs as process %s" % (how, running[0])
    else:
        text = "%s, but it does not run; process 1 is %s" % (how, first)
    found.tell("service", bool(missing or not running), text)


def command_line(proc, number):
    """Return the command line of a process as bytes, split into words."""
    return read_bounded("%s/%s/cmdline" % (proc, number), 4096).split(b"\0")


def agent_processes(proc):
    """Return the numbers of the processes that run the installed agent as a service."""
    names = [name for name in compat.list_names(proc) if compat.is_digits(name)]
    return [name for name in names if is_agent(command_line(proc, name))]


def is_agent(words):
    """Return whether a process is the agent, and does not only have its path as an argument.

    It is the program itself, or the first word after an interpreter's options.
    """
    program = words[0].rpartition(b"/")[2]
    words = list(words)
    if b"python" in program or program in (b"sh", b"ash", b"bash", b"dash"):
        del words[0]
        while words and words[0][:1] == b"-":
            del words[0]
    word = compat.to_text(words[1]) if words[1:] else ""
    return words[:1] == [AGENT] and word not in WORDS


AGENT = b"/usr/local/bin/guest-agent"
WORDS = ("install", "uninstall", "once", "check", "identify")


def _check_manager(manager, found):
    lookup = Outcome()
    function = compat.lookup_function(manager.host, manager.port)
    _wait(run_program(None, SECONDS, lookup, compat.Clock(), function=function))
    targets = compat.parse_lookup(lookup.output, manager.port)
    if not targets:
        found.tell("manager", True, "%s could not be looked up" % manager.host)
        return
    if manager.scheme == "https":
        _check_https(manager, found)
        return
    request = "GET %s/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
    for target in targets:
        outcome = _ask(target, request % (manager.prefix, manager.authority()))
        if outcome.status:
            text = "%s answers over HTTP (with %d to GET %s/)"
            text %= (manager.authority(), outcome.status, manager.prefix)
            found.tell("manager", False, text)
            return
    where = ", ".join([compat.numeric_host(target) for target in targets])
    found.tell("manager", True, "%s: %s" % (where, outcome.failure or "does not speak HTTP"))


def _check_https(manager, found):
    """Check a manager over HTTPS with curl or wget, which also send reports over HTTPS."""
    url = "https://%s%s/" % (manager.authority(), manager.prefix)
    failure = "reports over HTTPS need curl or wget, and there is neither"
    for argv in (
        ("curl", "-q", "-sS", "-m", "5", "-o", "/dev/null", url),
        ("wget", "-q", "-T", "5", "-t", "1", "-O", "/dev/null", url),
    ):
        outcome = Outcome()
        _wait(run_program(argv, SECONDS * 2, outcome, compat.Clock()))
        if outcome.status == 0 or (argv[0] == "wget" and outcome.status == 8):
            found.tell("manager", False, "%s answers to %s" % (url, argv[0]))
            return
        if outcome.status != 127:
            failure = "%s: %s ended with status %d" % (url, argv[0], outcome.status or -1)
            break
    found.tell("manager", True, failure)


def _wait(flow):
    for pause in flow:
        time.sleep(pause)
