"""Install the agent in the running system, and uninstall it.

``services`` has the variants of each init system. Some interpreters cannot make links
or change modes, so programs of the system do that: ``ln``, ``chmod``, ``rm``.
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
RECEIPT = FOLDER + "/receipt.json"  # only an injected agent has it
MANIFEST = FOLDER + "/installed"
SECONDS = 60.0

_NAME = "guest-agent"
_NEW = ".guest-agent-new"
_KEPT = FOLDER + "/set-aside/"
# Files that the agent and its scripts create at run time.
_LEFT = ("/var/log/guest-agent.log", "/var/log/guest-agent.log.1", "/run/guest-agent.identity")
_LEFT += ("/var/run/guest-agent.pid", "/var/run/guest-agent.child.pid")
ANSWER_SECONDS = 30.0


class InstallError(Exception):
    """Raised when the request cannot be fulfilled; the argument says why."""


def _run(argv):
    """Run a program and return its outcome; the status is 127 if there is no such program."""
    outcome = Outcome()
    for pause in run_program(argv, SECONDS, outcome, compat.Clock()):
        time.sleep(pause)
    return outcome


def _must(*argv):
    outcome = _run(argv)
    if outcome.status != 0:
        raise InstallError("%s failed with status %s" % (" ".join(argv), outcome.status))


def _write(path, content, mode):
    """Write a new file and rename it, so that readers see the old content or the new."""
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


class _Variant(object):
    """One way to run the service: an entry of ``services.VARIANTS``.

    ``Live`` in ``initsystem/definition.py`` describes its parts, except the name and
    the operations: tuples of kind, path, mode, and content or link target.
    """

    def __init__(self, parts):
        self.name, self.processes, self.files = parts[:3]
        self.start, self.stop, self.afterwards, self.operations = parts[3:]

    def find_files(self):
        """Return the first existing path of each group, None for a group without one."""
        return [
            ([path for path in group if compat.exists(path)] + [None])[0] for group in self.files
        ]


def find_variant():
    """Return the variant for the init system that runs this machine. Raises InstallError."""
    process = _identify_process_1()
    for variant in [_Variant(parts) for parts in services.VARIANTS]:
        if process in (variant.processes or [process]) and None not in variant.find_files():
            return variant
    raise InstallError("process 1 is %s, and there is no service for it here" % process)


def _identify_process_1():
    """Return the program of process 1: BusyBox and Upstart are both called init."""
    if b"busybox" in _run(("readlink", "-f", "/proc/1/exe")).output:
        return "busybox"
    if b"upstart" in _run(("initctl", "version")).output:
        return "upstart"
    return (guest.parse_process(read_bounded("/proc/1/stat")) or {}).get("comm")


def with_block(source, block):
    """Return a file's content with a block before its last ``exit`` or at its end; None: without.

    A marker whose partner is missing does not delimit a block, so the lines stay.
    """
    lines = []
    begin = None
    for line in source.split(b"\n"):
        if line == services.BEGIN:
            begin = len(lines)
        elif line == services.END and begin is not None:
            del lines[begin:]
            begin = None
        else:
            lines.append(line)
    if block:
        last = len(lines) - 1 if lines[-1:] == [b""] else len(lines)
        ends = [at for at, line in enumerate(lines) if _is_end(line)]
        at = ends[-1] if ends else last
        lines[at:at] = [services.BEGIN] + block.split(b"\n")[:-1] + [services.END]
    return b"\n".join(lines)


def _is_end(line):
    """Return whether a script ends at this line: an ``exit`` without indentation."""
    words = line.split(b"#")[0].replace(b";", b" ").split()
    return words[:1] == [b"exit"] and len(words) < 3 and line[:1] == b"e"


def _edit(path, block, mode):
    """Put a block into a file; a block of None removes it."""
    source = read_bounded(path, 1048577)
    if len(source) > 1048576:
        raise InstallError("%s is larger than 1 MiB: edit it by hand" % path)
    new = path + _NEW
    _must("cp", "-p", path, new)
    target = open(new, "wb")
    try:
        target.write(with_block(source, block))
    finally:
        target.close()
    if mode:
        _must("chmod", "+%o" % mode, new)
    _must("mv", "-f", new, path)


def _folders(path):
    """Return the folders above a path that do not exist, outermost first."""
    missing = []
    folder = path.rpartition("/")[0]
    while folder and not compat.exists(folder):
        missing.insert(0, folder)
        folder = folder.rpartition("/")[0]
    return missing


def _check():
    if not compat.is_root():
        raise InstallError("only root can do this: run it as root")
    if compat.exists(RECEIPT):
        raise InstallError("this agent was injected: remove it with `vmprovision remove`")


class _Manifest(object):
    """A list of everything that install makes, written before each step, for uninstall.

    A line is the path of a file, link or folder that install made. ``# `` marks a file
    with the agent's block, ``< `` a file whose earlier content is kept.
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
        """Record a path that will be written; make its parent folders and keep an existing file."""
        for folder in _folders(path):
            _must("mkdir", folder)
            self.record(folder)
        if path not in self.lines:
            self.keep(path)
            self.record(path)
        return path

    def keep(self, path):
        """Keep a copy of an existing file."""
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
        raise InstallError(
            "%s is not the agent's archive: make one with `vmprovision agent build`" % own_path
        )
    variant = find_variant()
    settings = config.read_settings(config.DEFAULT_PATH, Log("/dev/null"))
    fault = check.why_not_listen(settings)
    if fault and not check.agent_processes("/proc"):
        text = "the agent cannot listen on port %d (%s): stop what does, or set PORT in %s"
        raise InstallError(text % (settings.port, fault, config.DEFAULT_PATH))
    manifest = _Manifest(variant.name, _take_manifest(variant.name, own_path))
    manifest.add(MANIFEST)
    if own_path != AGENT:
        manifest.add(AGENT)
        _must("cp", own_path, AGENT + _NEW)
        _put(AGENT + _NEW, AGENT, 0o755)
    if not compat.exists(config.DEFAULT_PATH):
        _write(manifest.add(config.DEFAULT_PATH), services.CONFIGURATION, 0o644)
    places = variant.find_files()
    for operation in variant.operations:
        _perform(operation, manifest, places)
    _must("chmod", "644", MANIFEST)
    for command in variant.start:
        _run(command.split())
    if not variant.start:
        _kill_agents(variant)
        _run(("sh", "-c", compat.to_text(variant.operations[0][3])))
    _await_answer(settings)
    return variant.name


def _perform(operation, manifest, places):
    """Write a file, make a link or edit a block; a block goes into the last of the places."""
    kind, path, mode, content = operation
    if kind == "block":
        path = places[-1]
        if "# " + path not in manifest.lines:
            manifest.keep(path)
            manifest.record("# " + path)
        _edit(path, content, mode)
    elif kind == "file":
        _write(manifest.add(path), content, mode)
    elif check.find_renamed(path) in (None, path):
        _must("ln", "-sfn", content, manifest.add(path))


def _await_answer(settings):
    """Wait until the installed agent answers. Raises InstallError if it does not."""
    clock = compat.Clock()
    while True:
        fault, text = check.look_at_port(settings)
        running = check.agent_processes("/proc")
        if running and not fault:
            return
        if clock() > ANSWER_SECONDS:
            if not running:
                text = "it does not run"
            raise InstallError("installed, but %s: see its log, %s" % (text, _LEFT[0]))
        time.sleep(0.5)


def _take_manifest(name, own_path):
    """Return what an earlier install made, after removing the service of another init system."""
    lines = compat.to_text(read_bounded(MANIFEST)).split("\n")[:-1]
    if lines and lines[0] != name:
        uninstall(own_path)
        return [AGENT] if own_path == AGENT and AGENT in lines else []
    return lines[1:]


def uninstall(spared=None):
    """Stop the agent, remove only what install made, and restore the kept files."""
    _check()
    lines = compat.to_text(read_bounded(MANIFEST)).split("\n")[:-1]
    if not lines:
        raise InstallError("nothing is installed here: there is no " + MANIFEST)
    known = [_Variant(parts) for parts in services.VARIANTS if parts[0] == lines[0]]
    for variant in known:  # other files are from another version
        for command in variant.stop:
            _run(command.split())
    for line in lines[:0:-1]:
        if line != spared:
            _take_out(line)
    for variant in known:
        for command in variant.afterwards:
            _run(command.split())
        if not variant.stop:
            _kill_agents(variant)
    _run(("rm", "-f") + _LEFT)
    return lines[0]


def _take_out(line):
    path = line[2:] if line[1:2] == " " else line
    if line[:2] == "# ":
        _edit(path, None, 0)
        if read_bounded(path, 1048577) == read_bounded(_kept(path), 1048577):
            _run(("mv", "-f", _kept(path), path))  # including mode and owner
    elif line[:2] == "< ":
        if compat.exists(path):  # the file has other lines by now
            _run(("rm", "-f", _kept(path)))
        else:
            _run(("mv", "-f", _kept(path), path))
    elif path == config.DEFAULT_PATH:
        if read_bounded(path) == services.CONFIGURATION:  # else it was changed since
            _run(("rm", "-f", path))
    else:
        # a folder is removed only if it is empty
        path = check.find_renamed(path) or path
        _run(("sh", "-c", 'rm -f "$1" 2>/dev/null || rmdir "$1"', "sh", path))


def _kill_agents(variant):
    """End the running agents, and the loops that would restart them."""
    scripts = variant.files[-1]
    for name in check.agent_processes("/proc"):
        found = guest.parse_process(read_bounded("/proc/%s/stat" % name)) or {}
        parent = found.get("ppid", 0)
        if parent > 1 and _is_loop(check.command_line("/proc", parent), scripts):
            _run(("kill", "%d" % parent))
        _run(("kill", name))


def _is_loop(words, scripts):
    """Return whether a shell runs the agent's loop, or a script that contains it."""
    texts = [compat.to_text(word) for word in words]
    return [text for text in texts if text in scripts or "until " + AGENT in text] != []


def main(word, argv):
    """Install or uninstall, print a line, and return the exit status."""
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
