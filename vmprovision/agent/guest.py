"""Describe the guest and the agent in it: ``GET /info``."""

from . import __version__, compat, kernel
from .files import read_bounded, read_text


def parse_process(stat):
    """Return a process's number, name and parent from /proc/PID/stat, or None.

    The name is in parentheses and may itself contain spaces and parentheses.
    """
    text = compat.to_text(stat)
    opening, closing = text.find("("), text.rfind(")")
    after = text[closing + 1 :].split()
    pid = text[:opening].strip()
    if opening < 0 or closing < opening or len(after) < 2:
        return None
    if not compat.is_digits(pid) or not compat.is_digits(after[1]):
        return None
    return {"pid": int(pid), "comm": text[opening + 1 : closing], "ppid": int(after[1])}


def parse_cgroup(cgroup):
    """Return this process's path in systemd's own or the unified hierarchy, or None.

    A path at the root of one hierarchy counts only if the other has none.
    """
    named = unified = None
    for line in compat.to_text(cgroup).split("\n"):
        fields = line.split(":", 2)
        if len(fields) == 3 and fields[1] == "name=systemd":
            named = fields[2]
        elif len(fields) == 3 and fields[0] == "0" and not fields[1]:
            unified = fields[2]
    return unified if unified and named in (None, "/") else named


def describe(proc, root, addresses, settings):
    """Return the answer of ``GET /info``; a fact that is not known is None."""

    def process(name):
        return parse_process(read_bounded("%s/%s/stat" % (proc, name))) or {}

    own = process("self")
    parent = process(own["ppid"]) if own.get("ppid") else {}
    release = kernel.os_release(root)
    return {
        "version": __version__,
        "runtime": compat.runtime_name(),
        "hostname": read_text(proc + "/sys/kernel/hostname"),
        "kernel": read_text(proc + "/sys/kernel/osrelease"),
        "machine": compat.machine(),
        "os": dict([(key, release.get(key)) for key in ("id", "version_id", "pretty_name")]),
        "addresses": addresses,
        "vm_id": settings.vm_id,
        "identity": settings.identity,
        "init": {
            "pid1": process("1").get("comm"),
            "pid1_exe": compat.read_link(proc + "/1/exe"),
            "pid": own.get("pid"),
            "parent": {"pid": own.get("ppid"), "comm": parent.get("comm")},
            "cgroup": parse_cgroup(read_bounded(proc + "/self/cgroup")),
        },
    }
