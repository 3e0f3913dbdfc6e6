"""Keep the manager informed of the guest's address.

A generator does one thing after another and yields the seconds that it wants to pause,
so nothing here blocks the server: programs run in children that are polled, sockets do
not block, and every wait has a limit.
"""

from . import addresses, compat
from .delivery import deliver_by_program, deliver_by_socket
from .tasks import Outcome, flow, run_program

FIRST_REPORT_SECONDS = 3.0
RETRY_SECONDS = 5.0
EAGER_SECONDS = 60.0  # seconds of failures, before retries become rarer
RETRY_LIMIT_SECONDS = 60.0
HEARTBEAT_SECONDS = 30.0
JITTER = 0.2  # the share by which a pause may be shorter, so that clones do not retry together
WATCH_SECONDS = 5.0
COMMAND_SECONDS = 3.0
REPEAT_FAILURE_SECONDS = 600.0


class Retries(object):
    """The pauses between retries: five seconds for a minute, then doubled, up to a minute."""

    def __init__(self):
        self._since = None
        self._pause = RETRY_SECONDS

    def begin(self):
        """Start again with short pauses, after a change or a success."""
        self._since = None
        self._pause = RETRY_SECONDS

    def next(self, now):
        """Return the pause after a failure at this time."""
        if self._since is None:
            self._since = now
        elif now - self._since > EAGER_SECONDS:
            self._pause = min(self._pause * 2, RETRY_LIMIT_SECONDS)
        return self._pause


class Reporter(object):
    """Find the guest's addresses and report the best one.

    The first report follows three seconds after the start; then one every five seconds
    until the manager accepts this address, then one every thirty; and one at once when
    addresses or routes change. After a minute of failures each pause is twice as long
    as the one before, up to a minute. Every pause is shortened by a random part of up
    to a fifth. ``addresses`` always has the latest result, even without a manager.
    """

    def __init__(self, settings, identity, proc, log, clock):
        self.addresses = []
        self.settings = settings
        self._identity = identity
        self._proc = proc
        self._log = log
        self._clock = clock
        self._fingerprint = None
        self._accepted = None
        self._failure = (None, 0.0)
        self._retries = Retries()
        self._targets = []  # the manager's socket addresses, while they work
        self._flow = flow(self._run())
        self._due = clock()

    def tick(self, now):
        """Continue if it is time; return the time of the next call."""
        if now < self._due:
            return self._due
        try:
            pause = next(self._flow)
        except Exception as error:
            self._log.limited("reporting: " + compat.describe_error(error))
            self._flow = flow(self._run())
            pause = RETRY_SECONDS
        self._due = now + pause
        return self._due

    def close(self):
        """Cancel the report that is being sent."""
        self._flow.close()

    def reconfigure(self, settings):
        """Start again with other settings."""
        self.settings = settings
        self._accepted = None
        self._targets = []
        self._retries.begin()
        self._flow.close()
        self._flow = flow(self._run())
        self._due = self._clock()

    def _run(self):
        start = self._clock()
        self._is_wanted()
        yield self._detect()
        yield max(0.0, start + FIRST_REPORT_SECONDS - self._clock())
        while True:
            yield self._detect()
            wanted = self._is_wanted()
            if wanted:
                yield self._report()
            settled = not wanted or (self.addresses and self._accepted == self.addresses[0])
            seconds = HEARTBEAT_SECONDS if settled else self._retries.next(self._clock())
            yield self._rest(seconds * (1 - JITTER * compat.chance(self._proc)))

    def _is_wanted(self):
        """Return whether guest name and manager are known, until a report is accepted."""
        if self._accepted is None:
            self._identity.complete(self.settings)
        if self.settings.vm_id and self.settings.manager:
            return True
        self._log.changed("report", "not reporting addresses: VM_ID or MANAGER_URL is not set")
        return False

    def _rest(self, seconds):
        """Wait, but only until the kernel's tables change."""
        end = self._clock() + seconds
        while self._clock() < end:
            yield min(WATCH_SECONDS, end - self._clock())
            if addresses.fingerprint(self._proc) != self._fingerprint:
                self._retries.begin()
                return

    def _detect(self):
        """Try the methods to find addresses until one of them finds a good one."""
        self._fingerprint = addresses.fingerprint(self._proc)
        defaults = addresses.default_interfaces(self._proc)
        interface = self.settings.interface
        candidates, is_complete = addresses.read_kernel(self._proc)
        chosen, good = addresses.choose(candidates, defaults, interface)
        for argv, parse in zip(addresses.COMMANDS, addresses.PARSERS):
            if good or is_complete:
                break
            outcome = Outcome()
            yield run_program(argv, COMMAND_SECONDS, outcome, self._clock)
            candidates += parse(compat.to_text(outcome.output))
            addresses.complete_names(candidates, self._proc)
            chosen, good = addresses.choose(candidates, defaults, interface)
        self.addresses = chosen
        where = " on " + interface if interface else ""
        found = ", ".join(chosen) or "none"
        self._log.changed("addresses", "addresses%s: %s" % (where, found))

    def _report(self):
        if not self.addresses:
            return
        address = self.addresses[0]
        settings = self.settings
        outcome = Outcome()
        if settings.manager.scheme == "http":
            yield self._find_manager(outcome)
            if outcome.failure is None:
                yield deliver_by_socket(settings, address, self._targets, outcome, self._clock)
        if outcome.failure or settings.manager.scheme == "https":
            if not outcome.hopeless:
                yield deliver_by_program(settings, address, outcome, self._clock)
        if outcome.failure is None:
            self._accepted = address
            self._failure = (None, 0.0)
            self._retries.begin()
            self._log.changed("report", "reported %s" % address)
        else:
            self._targets = []
            self._tell_failure("reporting %s failed: %s" % (address, outcome.failure))

    def _find_manager(self, outcome):
        if self._targets:
            return
        host, port = self.settings.manager.host, self.settings.manager.port
        if ":" in host or addresses.is_ipv4(host):
            try:
                self._targets = compat.resolve(host, port)
            except Exception as error:  # gaierror is not one of SOCKET_ERRORS everywhere
                outcome.failure = "%s: %s" % (host, compat.describe_error(error))
            return
        lookup = Outcome()
        look_up = compat.lookup_function(host, port)
        yield run_program(None, COMMAND_SECONDS, lookup, self._clock, function=look_up)
        self._targets = compat.parse_lookup(lookup.output, port)
        if not self._targets:
            outcome.failure = "%s could not be looked up" % host

    def _tell_failure(self, text):
        """Log a failure if it is new, and every ten minutes while it stays the same."""
        last, since = self._failure
        now = self._clock()
        if text != last or now - since >= REPEAT_FAILURE_SECONDS:
            self._failure = (text, now)
            self._log.changed("report", None, lambda _: None)  # so that the next success is logged
            self._log.warning(text)
