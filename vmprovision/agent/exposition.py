"""``GET /metrics`` for Prometheus: its text format, version 0.0.4.

Names, types, units and labels are those of node_exporter for the same figures, so that its
dashboards and alerts work. Metrics of the agent itself begin with ``guest_agent_``.
Fractions are written from the kernel's integers, so nothing is rounded.
"""

import time

from . import __version__, compat, kernel
from .files import read_lines, read_text

PIECE_SIZE = 1024

_MODES = "user nice system idle iowait irq softirq steal".split()
_STAT = {
    "intr": "intr_total",
    "ctxt": "context_switches_total",
    "btime": "boot_time_seconds",
    "processes": "forks_total",
    "procs_running": "procs_running",
    "procs_blocked": "procs_blocked",
}
_DISK = (
    "reads_completed_total reads_merged_total read_bytes_total read_time_seconds_total"
    " writes_completed_total writes_merged_total written_bytes_total write_time_seconds_total"
    " io_now io_time_seconds_total io_time_weighted_seconds_total"
    " discards_completed_total discards_merged_total discarded_sectors_total"
    " discard_time_seconds_total flush_requests_total flush_requests_time_seconds_total"
).split()
_NETWORK = ["receive_%s_total" % x for x in "bytes packets errs drop fifo frame compressed".split()]
_NETWORK += ["receive_multicast_total"]
_NETWORK += ["transmit_%s_total" % x for x in "bytes packets errs drop fifo colls carrier".split()]
_NETWORK += ["transmit_compressed_total"]
_FILE_SYSTEM = "size_bytes free_bytes avail_bytes files files_free readonly device_error".split()
_PRESSURE = (
    ("cpu", "some", "waiting"),
    ("io", "some", "waiting"),
    ("io", "full", "stalled"),
    ("memory", "some", "waiting"),
    ("memory", "full", "stalled"),
)
# Colons are reserved for Prometheus' recording rules.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
_NUMBERS = (  # a name, a file below /proc/sys, and the index of a word in it
    ("filefd_allocated", "fs/file-nr", 0),
    ("filefd_maximum", "fs/file-nr", 2),
    ("nf_conntrack_entries", "net/netfilter/nf_conntrack_count", 0),
    ("nf_conntrack_entries_limit", "net/netfilter/nf_conntrack_max", 0),
)


def _labels(pairs):
    """Return pairs of name and text as the labels of a sample."""
    out = []
    for name, text in pairs:
        text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")  # noqa: PLW2901
        out.append('%s="%s"' % (name, text))
    return "{" + ",".join(out) + "}"


def _begin(name, source, kind=None):
    """Return the lines before the samples of a metric."""
    kind = kind or ("counter" if name.endswith("_total") else "gauge")
    words = name.partition("_")[2].replace("_", " ")
    return "# HELP %s %s, from %s.\n# TYPE %s %s\n" % (name, words, source, name, kind)


def _single(name, source, value, kind=None):
    return "%s%s %s\n" % (_begin(name, source, kind), name, value)


def _information(name, source, pairs):
    return "%s%s%s 1\n" % (_begin(name, source), name, _labels(pairs))


def _fraction(number, unit, digits):
    """Return a count of hundredths, thousandths or millionths as a decimal."""
    return "%d.%0*d" % (number // unit, digits, number % unit)


def _processors(name, modes, rows):
    yield _begin(name, "/proc/stat")
    for words in rows:
        for mode, ticks in zip(modes, kernel.numbers(words[1:]) or []):
            labels = _labels((("cpu", words[0][3:]), ("mode", mode)))
            yield "%s%s %s\n" % (name, labels, _fraction(ticks, 100, 2))


def _stat(proc, _):
    guests, singles, seen = [], [], set()

    def rows():
        for line in read_lines(proc + "/stat"):
            words = compat.to_text(line).split()
            if not words or words[0] in seen:
                continue
            seen.add(words[0])
            if line[:3] == b"cpu" and compat.is_digits(words[0][3:]):
                guests.append(words[:1] + words[9:])
                yield words
            elif words[0] in _STAT and kernel.numbers(words[1:2]):
                singles.append((_STAT[words[0]], kernel.numbers(words[1:2])[0]))

    for text in _processors("node_cpu_seconds_total", _MODES, rows()):
        yield text
    for text in _processors("node_cpu_guest_seconds_total", _MODES[:2], guests):
        yield text
    for name, number in singles:
        yield _single("node_" + name, "/proc/stat", number)


def _memory(proc, _):
    seen = set()
    for line in read_lines(proc + "/meminfo", 16384):
        name, _, rest = compat.to_text(line).partition(":")
        words = rest.split()
        value = kernel.numbers(words[:1])
        if value:
            name = name.replace("(", "_").replace(")", "")
            if words[1:] == ["kB"]:
                name, value = name + "_bytes", [value[0] * 1024]
            if _is_new(name, seen):
                yield _single("node_memory_" + name, "/proc/meminfo", value[0])


def _is_new(name, seen):
    """Return whether a kernel's name is valid for a metric; an invalid one spoils the text."""
    if name in seen or name.strip(_LETTERS):
        return False
    seen.add(name)
    return True


def _load(proc, _):
    words = (read_text(proc + "/loadavg", 128) or "").split()
    if len(words) > 2:
        for name, word in zip(("1", "5", "15"), words):
            if compat.is_digits(word.replace(".", "", 1)):
                yield _single("node_load" + name, "/proc/loadavg", float(word))


def _table(prefix, names, rows, source, render):
    """Return a metric for each column of a table, with a sample from each row of full length."""
    rows = [row for row, _ in zip(rows, range(compat.ROW_LIMIT))]
    seen = set()
    rows = [row for row in rows if not (row[0] in seen or seen.add(row[0]))]
    for place, name in enumerate(names):
        samples = [row for row in rows if len(row[1]) > place and row[1][place] is not None]
        if samples:
            yield _begin(prefix + name, source)
        for labels, values in samples:
            yield "%s%s%s %s\n" % (prefix, name, labels, render(name, values[place]))


def _disk_value(name, number):
    if name.endswith("seconds_total"):
        return _fraction(number, 1000, 3)
    return number * 512 if name.endswith("bytes_total") else number


def _value(_, number):
    return number


def _by_device(rows):
    return ((_labels((("device", name),)), counters) for name, counters in rows)


def _disks(proc, _):
    rows = _by_device(kernel.disks(proc))
    return _table("node_disk_", _DISK, rows, "/proc/diskstats", _disk_value)


def _networks(proc, _):
    rows = _by_device(kernel.networks(proc))
    return _table("node_network_", _NETWORK, rows, "/proc/net/dev", _value)


def _interfaces(proc, root):
    rows = []
    for name, _ in kernel.networks(proc):
        folder = "%s/sys/class/net/%s/" % (root, name)
        state, mtu = read_text(folder + "operstate", 64), read_text(folder + "mtu", 64)
        mtu = kernel.numbers([mtu or ""])
        if state and mtu:
            rows.append((_labels((("device", name),)), [int(state == "up")] + mtu))
    return _table("node_network_", ["up", "mtu_bytes"], rows, "/sys/class/net", _value)


def _file_systems(proc, root):
    rows = []
    for device, point, kind, is_read_only, figures in kernel.file_systems(proc, root):
        labels = _labels((("device", device), ("fstype", kind), ("mountpoint", point)))
        values = [None] * 5 + [int(is_read_only), int(figures is None)]
        if figures:
            values[:3] = [figures[1] * figures[at] for at in (2, 3, 4)]
            values[3:5] = figures[5:7]
        rows.append((labels, values))
    return _table("node_filesystem_", _FILE_SYSTEM, rows, "statvfs(3)", _value)


def _pressure(proc, _):
    for resource, wanted, word in _PRESSURE:
        for kind, values in kernel.pressure(proc, resource):
            if kind == wanted:
                name = "node_pressure_%s_%s_seconds_total" % (resource, word)
                total = _fraction(int(values["total"]), 1000000, 6)
                yield _single(name, "/proc/pressure/" + resource, total)
                break


def _vmstat(proc, _):
    seen = set()
    for line in read_lines(proc + "/vmstat", 32768):
        if line[:2] not in (b"pg", b"ps", b"oo"):
            continue
        name, _, number = compat.to_text(line).partition(" ")
        is_fault = name[:2] == "pg" and name.endswith("fault")
        if name[:4] in ("pgpg", "pswp") or is_fault or name == "oom_kill":
            value = kernel.numbers([number])
            if value and _is_new(name, seen):
                yield _single("node_vmstat_" + name, "/proc/vmstat", value[0], "untyped")


def _sockets(proc, _):
    seen = set()
    for file_name in ("/net/sockstat", "/net/sockstat6"):
        for line in read_lines(proc + file_name, 4096):
            protocol, _, rest = compat.to_text(line).partition(":")
            words = rest.split()
            for key, number in zip(words[::2], words[1::2]):
                name, value = "%s_%s" % (protocol, key), kernel.numbers([number])
                if value and _is_new(name, seen):
                    yield _single("node_sockstat_" + name, "/proc" + file_name, value[0])


def _numbers(proc, _):
    for name, path, place in _NUMBERS:
        words = (read_text("%s/sys/%s" % (proc, path), 128) or "").split()
        value = kernel.numbers(words[place : place + 1])
        if value:
            yield _single("node_" + name, "/proc/sys/" + path, value[0])


def _system(proc, root):
    yield _single("node_time_seconds", "the clock", "%.3f" % time.time())
    names = (("sysname", "ostype"), ("release", "osrelease"), ("version", "version"))
    names += (("nodename", "hostname"), ("domainname", "domainname"))
    pairs = [(name, read_text("%s/sys/kernel/%s" % (proc, key), 512) or "") for name, key in names]
    yield _information("node_uname_info", "uname(2)", pairs + [("machine", compat.machine())])
    release = kernel.os_release(root)
    if release:
        names = "build_id id id_like image_id image_version name pretty_name variant variant_id"
        names = (names + " version version_codename version_id").split()
        pairs = [(name, release.get(name, "")) for name in names]
        yield _information("node_os_info", "os-release(5)", pairs)


_COLLECTORS = (_system, _stat, _memory, _load, _disks, _networks, _interfaces, _file_systems)
_COLLECTORS += (_pressure, _vmstat, _sockets, _numbers)


def render(proc, root, vm_id):
    """Yield the text in pieces of some kilobytes, because all of it may not fit into memory.

    Figures that cannot be read or parsed are left out.
    """
    pairs = (("version", __version__), ("runtime", compat.runtime_name()))
    pieces = [_information("guest_agent_build_info", "the agent", pairs)]
    if vm_id:
        pieces.append(_information("guest_agent_machine_info", "the agent", (("vm_id", vm_id),)))
    size = 0
    for collect in _COLLECTORS:
        try:
            for text in collect(proc, root):
                pieces.append(text)
                size += len(text)
                if size > PIECE_SIZE:
                    yield compat.to_bytes("".join(pieces))
                    size, pieces = 0, []
        except (ValueError, KeyError, IndexError, TypeError, OSError):
            pass
    if pieces:  # an empty chunk would end the body
        yield compat.to_bytes("".join(pieces))
