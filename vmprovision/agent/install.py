"""Puts the agent into the running system, and takes it out again: install and uninstall.

What each init system gets is in ``services``, a module that is made from the
templates when the archive is built. Programs of the system do what not every
interpreter can: ``ln``, ``chmod``, ``rm``.
"""

import sys
import time

from . import compat, config, guest, services
from .files import read_bounded
from .tasks import Outcome, run_program

AGENT = "/usr/local/bin/guest-agent"
FOLDER = "/usr/local/lib/guest-agent"
RECEIPT = FOLDER + "/receipt.json"  # of an agent that was injected
MANIFEST = FOLDER + "/installed"
RC_LOCAL = ("/etc/rc.d/rc.local", "/etc/rc.local")
SECONDS = 60.0

_NAME = "guest-agent"
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
    """Writes beside the file and renames: whoever runs or reads it has the old one or the new."""
    new = path + ".new"
    target = open(new, "wb")
    try:
        target.write(content)
    finally:
        target.close()
    _put(new, path, mode)


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


def _edit(path, block, mode):
    """Puts a block before the last ``exit 0`` of a file, or at its end; none takes it out."""
    source = read_bounded(path, 1048577)
    if len(source) > 1048576:
        raise InstallError(path + " is too long to be edited")
    lines = _strip_block(source.split(b"\n"))
    if block:
        last = len(lines) - 1 if lines[-1:] == [b""] else len(lines)
        ends = [at for at, line in enumerate(lines) if line.rstrip() == b"exit 0"]
        at = ends[-1] if ends else last
        lines[at:at] = [services.BEGIN] + block.split(b"\n")[:-1] + [services.END]
    new = path + ".guest-agent"
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


def install(own_path):  # noqa: C901 -- one step after the other
    """Copies the agent, and makes the init system start it now and at every boot."""
    _check()
    if read_bounded(own_path, 4) not in (b"#!/b", b"\x7fELF"):
        raise InstallError("%s is not the agent as one file" % own_path)
    variant = find_variant()
    made = _take_manifest(variant)

    def add(path):
        for folder in _folders(path):
            _must("mkdir", folder)
            made.append(folder)
        if path not in made and not compat.exists(path):
            made.append(path)
        return path

    add(MANIFEST)
    if own_path != AGENT:
        _must("cp", own_path, add(AGENT) + ".new")
        _put(AGENT + ".new", AGENT, 493)
    if not compat.exists(config.DEFAULT_PATH):
        _write(add(config.DEFAULT_PATH), services.CONFIGURATION, 420)
    for kind, path, mode, content in services.SERVICES[variant]:
        if kind == "block":
            if variant == "standalone":
                path = _rc_local()  # noqa: PLW2901
            _edit(path, content, mode)
            made.append("# " + path)
        elif kind == "link":
            _must("ln", "-sfn", content, add(path))
        else:
            _write(add(path), content, mode)
    _write(MANIFEST, compat.to_bytes("\n".join([variant] + made) + "\n"), 420)
    for argv in _START.get(variant.split()[0], ()):
        _run(argv)
    if variant == "standalone":
        _kill_agents()
        _run(("sh", "-c", compat.to_text(services.SERVICES[variant][0][3])))
    return variant


def _take_manifest(variant):
    """What an earlier install made; another init system's service goes first."""
    lines = compat.to_text(read_bounded(MANIFEST)).split("\n")[:-1]
    if lines and lines[0] != variant:
        uninstall()
        return []
    return lines[1:]


def uninstall():
    """Stops the agent and takes away what install made, and nothing else."""
    _check()
    lines = compat.to_text(read_bounded(MANIFEST)).split("\n")[:-1]
    if not lines:
        raise InstallError("nothing was installed here: there is no " + MANIFEST)
    system = lines[0].split()[0]
    for argv in _STOP.get(system, ()):
        _run(argv)
    for path in lines[:0:-1]:
        if path.startswith("# "):
            _edit(path[2:], None, 0)
        elif path == config.DEFAULT_PATH:
            if read_bounded(path) == services.CONFIGURATION:  # else somebody has written in it
                _run(("rm", "-f", path))
        else:
            # what is a folder goes only if nobody else has put something into it
            _run(("sh", "-c", 'rm -f "$1" 2>/dev/null || rmdir "$1"', "sh", path))
    for argv in _AFTERWARDS.get(system, ()):
        _run(argv)
    if system in ("busybox", "standalone"):
        _kill_agents()
    return lines[0]


def _kill_agents():
    """Ends the agents that run, and the loops that would start them again."""
    own = guest.parse_process(read_bounded("/proc/self/stat")) or {}
    for name in list(compat.list_names("/proc")):
        found = (
            guest.parse_process(read_bounded("/proc/%s/stat" % name)) if name.isdigit() else None
        )
        words = read_bounded("/proc/%s/cmdline" % name).split(b"\0") if found else []
        if compat.to_bytes(AGENT) not in words[:8] or found["pid"] in (own["pid"], own["ppid"]):
            continue
        if found["ppid"] > 1:
            parent = guest.parse_process(read_bounded("/proc/%d/stat" % found["ppid"])) or {}
            if parent.get("comm") in ("sh", "ash", "bash", "dash", "rc.local"):
                _run(("kill", "%d" % found["ppid"]))
        _run(("kill", name))


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
