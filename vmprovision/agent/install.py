"""Puts the agent into the running system, and takes it out again: install and uninstall.

What each init system gets is in ``services``, a module that is made from the
templates when the archive is built. Programs of the system do what not every
interpreter can: ``ln``, ``chmod``, ``rm``.
"""

import sys
import time

from . import compat, config, guest
from .files import read_bounded
from .log import Log
from .tasks import Outcome, run_program

check = compat.load("check")
services = compat.load("services")

AGENT = "/usr/local/bin/guest-agent"
FOLDER = "/usr/local/lib/guest-agent"
RECEIPT = FOLDER + "/receipt.json"  # of an agent that was injected
MANIFEST = FOLDER + "/installed"
RC_LOCAL = ("/etc/rc.d/rc.local", "/etc/rc.local")
SECONDS = 60.0

_NAME = "guest-agent"
_NEW = ".guest-agent-new"
_KEPT = FOLDER + "/set-aside/"
# What the agent and its scripts make, wherever they run.
_TRACES = ("/var/log/guest-agent.log", "/var/log/guest-agent.log.1", "/run/guest-agent.identity")
_TRACES += ("/var/run/guest-agent.pid", "/var/run/guest-agent.child.pid")
ANSWER_SECONDS = 30.0
_SCRIPT = "/etc/init.d/" + _NAME
# What is run to start and to stop, and after the files have gone. Whatever is not there, or was
# not running, fails without harm: at the end the agent itself is asked whether it answers.
_START = {
    "systemd": (("systemctl", "daemon-reload"), ("systemctl", "restart", _NAME)),
    "openrc": (("rc-service", _NAME, "restart"),),
    "sysv": (
        ("update-rc.d", _NAME, "defaults"),
        ("chkconfig", "--add", _NAME),
        (_SCRIPT, "restart"),
    ),
    "upstart": (
        ("initctl", "reload-configuration"),
        ("initctl", "stop", _NAME),
        ("initctl", "start", _NAME),
    ),
    "runit": (("sv", "restart", _NAME),),
    "dinit": (("dinitctl", "restart", _NAME), ("dinitctl", "start", _NAME)),
    "finit": (("initctl", "reload"), ("initctl", "restart", _NAME)),
    "busybox": (("kill", "-HUP", "1"),),
}
_STOP = {
    "systemd": (("systemctl", "stop", _NAME),),
    "openrc": (("rc-service", _NAME, "stop"),),
    "sysv": ((_SCRIPT, "stop"), ("chkconfig", "--del", _NAME)),
    "upstart": (("initctl", "stop", _NAME),),
    "runit": (("sv", "force-stop", _NAME),),
    "dinit": (("dinitctl", "stop", _NAME),),
    "finit": (("initctl", "stop", _NAME),),
}
_AFTERWARDS = {
    "systemd": (("systemctl", "daemon-reload"),),
    "sysv": (("update-rc.d", _NAME, "remove"),),
    "upstart": (("initctl", "reload-configuration"),),
    "finit": (("initctl", "reload"),),
    "busybox": (("kill", "-HUP", "1"),),
}


class InstallError(Exception):
    """What was asked for cannot be done; the argument says why."""


def _run(argv):
    """The outcome of a program; its status is 127 where there is none of that name."""
    outcome = Outcome()
    for pause in run_program(argv, SECONDS, outcome, compat.Clock()):
        time.sleep(pause)
    return outcome


def _must(*argv):
    outcome = _run(argv)
    if outcome.status != 0:
        raise InstallError("%s failed with status %s" % (" ".join(argv), outcome.status))


def _write(path, content, mode):
    """Write beside the file and rename: who runs or reads it has the old one or the new."""
    new = path + _NEW
    target = open(new, "wb")
    try:
        try:
            target.write(content)
        finally:
            target.close()
        _put(new, path, mode)
    finally:
        _run(("rm", "-f", new))  # where that failed


def _put(new, path, mode):
    _must("chmod", "%o" % mode, new)
    _must("mv", "-f", new, path)


def find_variant():  # noqa: C901, PLR0911 -- one table of questions
    """The key of ``services.SERVICES`` for the init system that runs this machine."""
    process = guest.parse_process(read_bounded("/proc/1/stat")) or {}
    name = process.get("comm")
    if compat.exists("/run/systemd/system"):  # sd_booted(3)
        return "systemd"
    if name == "runit":
        return "runit artix" if compat.exists("/etc/runit/sv") else "runit usual"
    if name in ("dinit", "finit"):
        return name
    if compat.exists("/run/openrc") or compat.exists("/lib/rc/init.d/softlevel"):
        if compat.exists("/sbin/supervise-daemon") or compat.exists("/usr/sbin/supervise-daemon"):
            return "openrc supervise-daemon"
        return "openrc openrc-run" if compat.exists("/sbin/openrc-run") else "openrc runscript"
    is_upstart = b"upstart" in _run(("initctl", "version")).output
    if is_upstart and not compat.exists("/etc/rc.d/init.d"):
        return "upstart"
    if b"busybox" in _run(("readlink", "-f", "/proc/1/exe")).output:
        if compat.exists("/etc/inittab"):
            return "busybox"
    elif name == "init" or is_upstart:
        if compat.exists("/etc/rc.d/init.d"):
            return "sysv redhat"
        if compat.exists("/etc/init.d") and compat.exists("/etc/rc2.d"):
            return "sysv debian"
    if _rc_local():
        return "standalone"
    raise InstallError("process 1 is %s, for which there is no service here" % name)


def _rc_local():
    found = [path for path in RC_LOCAL if compat.exists(path)]
    return found[0] if found else None


def _strip_block(lines):
    """The lines of a file without those between our marks, and the marks."""
    kept = []
    inside = False
    for line in lines:
        if line == services.BEGIN:
            inside = True
        elif line == services.END and inside:
            inside = False
        elif not inside:
            kept.append(line)
    return kept


def _is_end(line):
    """Return whether a script ends with this line: an ``exit`` that no block is around."""
    words = line.split(b"#")[0].replace(b";", b" ").split()
    return words[:1] == [b"exit"] and len(words) < 3 and line[:1] == b"e"


def _edit(path, block, mode):
    """Put a block before the last ``exit`` of a file, or at its end; none takes it out."""
    source = read_bounded(path, 1048577)
    if len(source) > 1048576:
        raise InstallError(path + " is too long to be edited")
    lines = _strip_block(source.split(b"\n"))
    if block:
        last = len(lines) - 1 if lines[-1:] == [b""] else len(lines)
        ends = [at for at, line in enumerate(lines) if _is_end(line)]
        at = ends[-1] if ends else last
        lines[at:at] = [services.BEGIN] + block.split(b"\n")[:-1] + [services.END]
    new = path + _NEW
    _must("cp", "-p", path, new)
    target = open(new, "wb")
    try:
        target.write(b"\n".join(lines))
    finally:
        target.close()
    if mode:
        _must("chmod", "+%o" % mode, new)
    _must("mv", "-f", new, path)


def _folders(path):
    """The folders above a path that are not there, outermost first."""
    missing = []
    folder = path.rpartition("/")[0]
    while folder and not compat.exists(folder):
        missing.insert(0, folder)
        folder = folder.rpartition("/")[0]
    return missing


def _check():
    if not compat.is_root():
        raise InstallError("only root can do this")
    if compat.exists(RECEIPT):
        raise InstallError("this agent was injected; `vmprovision remove` takes it out")


class _Manifest(object):
    """What was put in, line by line: whatever happens, uninstall finds all that was begun.

    A path is a file, link or folder that is ours; behind ``# `` is one with our block,
    and behind ``< `` one whose former content is kept.
    """

    def __init__(self, variant, lines):
        self.lines = lines
        self._variant = variant

    def record(self, line):
        if line in self.lines:
            return
        self.lines.append(line)
        if line == MANIFEST or MANIFEST in self.lines:
            target = open(MANIFEST, "wb")
            try:
                target.write(compat.to_bytes("\n".join([self._variant] + self.lines) + "\n"))
            finally:
                target.close()

    def add(self, path):
        """Make the folders above a path that is going to be written, and keep what is there."""
        for folder in _folders(path):
            _must("mkdir", folder)
            self.record(folder)
        if path not in self.lines:
            self.keep(path)
            self.record(path)
        return path

    def keep(self, path):
        """Set aside a copy of what somebody else has at a path."""
        if not compat.exists(path) and compat.read_link(path) is None:
            return
        if _KEPT[:-1] not in self.lines:
            _must("mkdir", "-p", _KEPT)
            self.record(_KEPT[:-1])
        _must("cp", "-pPR", path, _kept(path))
        self.record("< " + path)


def _kept(path):
    return _KEPT + path[1:].replace("/", "%")


def install(own_path):
    """Copy the agent, and make the init system start it now and at every boot."""
    _check()
    if read_bounded(own_path, 4) not in (b"#!/b", b"\x7fELF"):
        raise InstallError("%s is not the agent as one file" % own_path)
    variant = find_variant()
    settings = config.read_settings(config.DEFAULT_PATH, Log("/dev/null"))
    fault = check.why_not_listen(settings)
    if fault and not check.agent_processes("/proc"):
        text = "the agent could not listen on port %d (%s): end what does, or set PORT in %s"
        raise InstallError(text % (settings.port, fault, config.DEFAULT_PATH))
    manifest = _Manifest(variant, _take_manifest(variant, own_path))
    manifest.add(MANIFEST)
    if own_path != AGENT:
        manifest.add(AGENT)
        _must("cp", own_path, AGENT + _NEW)
        _put(AGENT + _NEW, AGENT, 0o755)
    if not compat.exists(config.DEFAULT_PATH):
        _write(manifest.add(config.DEFAULT_PATH), services.CONFIGURATION, 0o644)
    for operation in services.SERVICES[variant]:
        _perform(operation, manifest)
    _must("chmod", "644", MANIFEST)
    for argv in _START.get(variant.split()[0], ()):
        _run(argv)
    if variant == "standalone":
        _kill_agents()
        _run(("sh", "-c", compat.to_text(services.SERVICES[variant][0][3])))
    _await_answer(settings)
    return variant


def _perform(operation, manifest):
    """Write a file, make a link or edit a block."""
    kind, path, mode, content = operation
    if kind == "block":
        if path in RC_LOCAL:
            path = _rc_local()
        if "# " + path not in manifest.lines:
            manifest.keep(path)
            manifest.record("# " + path)
        _edit(path, content, mode)
    elif kind == "file":
        _write(manifest.add(path), content, mode)
    elif check.find_renamed(path) in (None, path):
        _must("ln", "-sfn", content, manifest.add(path))


def _await_answer(settings):
    """Return when the agent that was installed answers. Raises InstallError: it does not."""
    clock = compat.Clock()
    while True:
        fault, text = check.look_at_port(settings)
        running = check.agent_processes("/proc")
        if running and not fault:
            return
        if clock() > ANSWER_SECONDS:
            if not running:
                text = "it does not run"
            raise InstallError("installed, but %s: see its log, %s" % (text, _TRACES[0]))
        time.sleep(0.5)


def _take_manifest(variant, own_path):
    """Return what an earlier install made; another init system's service goes first."""
    lines = compat.to_text(read_bounded(MANIFEST)).split("\n")[:-1]
    if lines and lines[0] != variant:
        uninstall(own_path)
        return [AGENT] if own_path == AGENT and AGENT in lines else []
    return lines[1:]


def uninstall(spared=None):
    """Stop the agent and take away what install made, and nothing else; put back what was kept."""
    _check()
    lines = compat.to_text(read_bounded(MANIFEST)).split("\n")[:-1]
    if not lines:
        raise InstallError("nothing was installed here: there is no " + MANIFEST)
    system = lines[0].split()[0]
    for argv in _STOP.get(system, ()):
        _run(argv)
    for line in lines[:0:-1]:
        if line != spared:
            _take_out(line)
    for argv in _AFTERWARDS.get(system, ()):
        _run(argv)
    if system in ("busybox", "standalone"):
        _kill_agents()
    _run(("rm", "-f") + _TRACES)
    return lines[0]


def _take_out(line):
    path = line[2:] if line[1:2] == " " else line
    if line[:2] == "# ":
        _edit(path, None, 0)
        if read_bounded(path, 1048577) == read_bounded(_kept(path), 1048577):
            _run(("mv", "-f", _kept(path), path))  # with its mode and owner
    elif line[:2] == "< ":
        if compat.exists(path):  # a file that is edited, and has other lines by now
            _run(("rm", "-f", _kept(path)))
        else:
            _run(("mv", "-f", _kept(path), path))
    elif path == config.DEFAULT_PATH:
        if read_bounded(path) == services.CONFIGURATION:  # else somebody has written in it
            _run(("rm", "-f", path))
    else:
        # what is a folder goes only if nobody else has put something into it
        path = check.find_renamed(path) or path
        _run(("sh", "-c", 'rm -f "$1" 2>/dev/null || rmdir "$1"', "sh", path))


def _kill_agents():
    """End the agents that run, and the loops that would start them again."""
    for name in check.agent_processes("/proc"):
        found = guest.parse_process(read_bounded("/proc/%s/stat" % name)) or {}
        parent = found.get("ppid", 0)
        if parent > 1 and _is_loop(check.command_line("/proc", parent)):
            _run(("kill", "%d" % parent))
        _run(("kill", name))


def _is_loop(words):
    """Return whether a shell runs the loop that we start, or that of rc.local."""
    texts = [compat.to_text(word) for word in words]
    return [text for text in texts if text in RC_LOCAL or "until " + AGENT in text] != []


def main(word, argv):
    """Does it and says so; gives the exit status."""
    try:
        if word == "uninstall":
            text = "uninstalled (%s)" % uninstall()
        else:
            text = "installed (%s), settings in %s" % (install(argv[0]), config.DEFAULT_PATH)
    except InstallError as error:
        sys.stderr.write("guest-agent: %s\n" % error.args[0])
        return 1
    except compat.FILE_ERRORS as error:
        sys.stderr.write("guest-agent: %s\n" % compat.describe_error(error))
        return 1
    compat.print_text("guest-agent: %s\n" % text)
    return 0
