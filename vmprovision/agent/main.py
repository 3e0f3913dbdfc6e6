"""The agent's command line and its only loop."""

import time

from . import __version__, access, compat, config, exposition, guest, http, identity, server, tasks
from .log import Log
from .metrics import Metrics
from .reporting import Reporter

USAGE = """\
usage: guest-agent install | uninstall
       guest-agent [once | check | identify] [OPTION...]

Answers /health, /metrics and /info over HTTP and reports this guest's address
to its manager. Runs in the foreground.

  install          install the agent in this system: the file, settings, a service
  uninstall        stop it and remove what install made
  once             print what /metrics answers, and exit
  check            check settings, port, service and manager; the status is 1 if
                   one of them is wrong
  identify         write what only root may read of this machine's identity to
                   /run/guest-agent.identity, for an agent that is not root
  --config FILE    read settings from FILE (default: /etc/guest-agent.conf)
  --port N         listen on port N (default: PORT in the settings, or 8080)
  --listen WHERE   listen on addresses, unix:PATH or vsock:PORT, separated by
                   commas (default: all addresses)
  --allow NETS     serve these addresses and networks only, and loopback
  --log-file FILE  append the log to FILE instead of stderr
  --user NAME      become this user once settings are read and the port is open
  --root DIR       find /proc, /sys and /run below DIR
  --proc DIR       read the kernel's figures from DIR (default: /proc)
  --version, --help
"""

_OPTIONS = {
    "--config": config.parse_word,
    "--port": config.parse_port,
    "--listen": config.parse_listen,
    "--allow": access.parse_allow,
    "--log-file": config.parse_word,
    "--user": config.parse_word,
    "--root": config.parse_word,
    "--proc": config.parse_word,
}


class UsageError(Exception):
    """Raised for an invalid command line; the argument says why."""


def parse_arguments(words):
    """Return the options given, such as ``{"--port": 80}``.

    Raises UsageError.
    """
    options = {}
    words = list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name in ("--help", "-h", "--version") and not equals:
            options[name] = True
            continue
        if name not in _OPTIONS:
            raise UsageError("unknown argument: " + name)
        if not equals:
            if not words:
                raise UsageError(name + " needs a value")
            value = words.pop(0)
        try:
            options[name] = _OPTIONS[name](value)
        except ValueError as error:
            raise UsageError("%s %s" % (name, error.args[0]))
    return options


def main(argv):
    """Run the agent until a signal stops it; return the exit status.

    0 after a clean stop, 1 if it cannot listen, 2 for a wrong command line.
    """
    compat.open_standard()
    compat.keep_to_itself()
    word = argv[1] if argv[1:] and argv[1] in _WORDS else None
    if word in ("install", "uninstall") and not argv[2:]:
        install = compat.load("install")
        return _end_well(install.main, word, argv)
    try:
        options = parse_arguments(argv[2 if word else 1 :])
    except UsageError as error:
        _complain("%s\n%s" % (error.args[0], USAGE))
        return 2
    return _end_well(_follow, word, options)


def _end_well(function, *arguments):
    """Return a function's exit status; print what stopped it in one line."""
    try:
        return function(*arguments)
    except KeyboardInterrupt:  # before Signals is set up
        return 0
    except compat.FILE_ERRORS as error:  # standard output is closed, or its disk is full
        _complain(compat.describe_error(error) + "\n")
        return 1


def _complain(text):
    try:
        compat.print_text("guest-agent: " + text, 2)
    except OSError:
        pass  # standard error is closed


def _follow(word, options):
    if "--version" in options:
        compat.print_text("guest-agent %s (%s)\n" % (__version__, compat.runtime_name()))
    elif "--help" in options or "-h" in options:
        compat.print_text(USAGE)
    else:
        return _WORDS[word](options) if word else _run(options)
    return 0


def _identify(options):
    identity.hand_over(options.get("--root", ""), options.get("--config", config.DEFAULT_PATH))
    return 0


def _once(options):
    check = compat.load("check")
    return check.once(*_places(options))


def _check(options):
    check = compat.load("check")
    path = options.get("--config", config.DEFAULT_PATH)
    return check.check(path, lambda log: _read_settings(options, log), *_places(options))


def _refuse(_options):
    _complain("install and uninstall take no options\n")
    return 2


_WORDS = {"identify": _identify, "once": _once, "check": _check}
_WORDS["install"] = _WORDS["uninstall"] = _refuse


def _places(options):
    """Return the path of /proc, and the prefix of all other paths."""
    root = options.get("--root", "")
    return options.get("--proc", root + "/proc"), root


def _read_settings(options, log):
    settings = config.read_settings(options.get("--config", config.DEFAULT_PATH), log)
    settings.port = options.get("--port", settings.port)
    settings.listen = options.get("--listen", settings.listen)
    settings.allow = options.get("--allow", settings.allow)
    settings.log_file = options.get("--log-file", settings.log_file)
    if settings.log_file:
        log.send_to(settings.log_file)
    return settings


def _run(options):
    log = Log()
    if "--log-file" in options:
        log.send_to(options["--log-file"])
    settings = _read_settings(options, log)
    proc, root = _places(options)
    known = identity.Identity(root, proc, log)
    known.complete(settings)
    listening = ", ".join(settings.listen) or "all addresses"
    where = "%s port %d" % (listening, settings.port)
    try:
        listeners = server.open_listeners(settings.listen, settings.port)
    except Exception as error:  # gaierror is not one of SOCKET_ERRORS everywhere
        text = "cannot listen on %s: %s" % (where, compat.describe_error(error))
        log.error(text)  # noqa: TRY400 -- a line, never a traceback
        return 1
    log.info("version %s on %s, listening on %s" % (__version__, compat.runtime_name(), where))
    try:
        _give_up_privileges(options.get("--user"), log)
    except compat.PrivilegeError as error:
        log.error(error.args[0])  # noqa: TRY400 -- a line, never a traceback
        return 1
    signals = compat.Signals()
    clock = compat.Clock()
    metrics = Metrics(proc, root, clock)
    reporter = Reporter(settings, known, proc, log, clock)
    routes = {
        "/health": lambda _: _health(),
        "/metrics": lambda request: _metrics(request, metrics, proc, root, reporter.settings),
        "/info": lambda _: guest.describe(proc, root, reporter.addresses, reporter.settings),
    }

    def configure(body, outcome):
        configure = compat.load("configure")
        return tasks.flow(configure.configure(body, root, outcome, clock))

    actions = {"/configure-interface": configure}
    serving = server.Server(listeners, routes, actions, settings, log, clock, signals.fileno)

    def reload():
        log.info("reading the configuration again")
        if config.is_out_of_reach(options.get("--config", config.DEFAULT_PATH)):
            log.warning("the configuration may not be read any more: restart the agent instead")
            return
        changed = _read_settings(options, log)
        known.complete(changed)
        reporter.reconfigure(changed)
        serving.settings = changed

    try:
        _loop((metrics, reporter, serving), clock, signals, reload, log)
    finally:
        reporter.close()
        serving.close()
        log.info("stopped")
    return 0


def _give_up_privileges(user, log):
    """Become this user permanently, if one is named and this is root. Raises PrivilegeError."""
    if user is not None and compat.is_root():
        uid, gid = config.find_user(user)
        log.give_to(uid, gid)
        compat.become(uid, gid)


def _health():
    return {"status": "healthy", "timestamp": int(time.time()), "version": __version__}


def _metrics(request, metrics, proc, root, settings):
    """Return the figures as JSON, or for Prometheus if the client prefers that."""
    if http.likes_exposition(request.fields.get(b"accept", ())):
        return http.Stream(http.EXPOSITION, exposition.render(proc, root, settings.vm_id))
    return metrics.read()


def _loop(parts, clock, signals, reload, log):
    """Call every part when it is due; the server, the last one, waits for clients in between."""
    while not signals.stopped:
        try:
            now = clock()
            parts[-1].wait(min([part.tick(now) for part in parts]) - now)
            signals.clear()
            if signals.reload:
                signals.reload = False
                reload()
        except Exception as error:  # such as out of memory: the agent must continue
            log.limited("in the loop: " + compat.describe_error(error))
            time.sleep(1)
