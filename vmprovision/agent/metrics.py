"""Measure the guest: the JSON answer of ``GET /metrics``, from /proc (proc(5)).

The figures are independent of each other: one that the kernel does not offer is None.
Works with kernels from 2.6 on, whose /proc/stat lines are shorter and whose
/proc/meminfo has no MemAvailable.
"""

from . import compat, jsonio, kernel
from .files import read_bounded

SAMPLE_SECONDS = 1.0
WINDOW = 5  # samples before the newest one
LIST_LIMIT = 64  # devices of a kind, or file systems
STAT_LIMIT = 8192  # bytes of /proc/stat, enough for some 130 processors

_MEMORY = (b"MemTotal", b"MemFree", b"MemAvailable", b"Buffers", b"Cached", b"Shmem")
_MEMORY = frozenset(_MEMORY + (b"SReclaimable", b"SwapTotal", b"SwapFree"))
_SECTORS = ("read_bytes", "written_bytes")


def parse_cpus(stat):
    """Return the tick counters of every processor in /proc/stat by name; "cpu" is their sum.

    The lists have 4 to 8 counters. Counters beyond the eighth (guest, guest_nice) are
    part of the first two.
    """
    found = {}
    for line in stat.split(b"\n"):
        fields = line.split()
        if fields and fields[0][:3] == b"cpu" and len(fields) > 4:
            ticks = kernel.numbers(fields[1:9])
            if ticks:
                found[compat.to_text(fields[0])] = ticks
    return found


def cpu_usage(before, after):
    """Return the percentage of time between two readings that was not idle.

    Idle is the fourth counter plus, if the kernel has it, iowait. Steal counts as busy,
    because the guest wanted to run. A counter that decreased (as iowait may) counts as
    unchanged.
    """
    steps = [max(0, new - old) for old, new in zip(before, after)]
    total = sum(steps)
    idle = sum(steps[3:5])
    return round(100.0 * (total - idle) / total, 1) if total else 0.0


def parse_memory(meminfo):
    """Return total and available memory, total and used swap in KiB from /proc/meminfo.

    None for a missing figure. Before MemAvailable (Linux 3.14) the sum of free memory, buffers
    and page cache replaces it, without shared memory, which is in the page cache but cannot
    be dropped.
    """
    values = {}
    for line in meminfo.split(b"\n"):
        name, _, rest = line.partition(b":")
        if name in _MEMORY:
            value = kernel.numbers(rest.split()[:1])
            if value and value[0] >= 0:
                values[name] = value[0]
    total = values.get(b"MemTotal")
    available = values.get(b"MemAvailable")
    if available is None and b"MemFree" in values:
        cache = values.get(b"Buffers", 0) + values.get(b"Cached", 0)
        cache += values.get(b"SReclaimable", 0) - values.get(b"Shmem", 0)
        available = values[b"MemFree"] + max(0, cache)
    if total is not None and available is not None:
        available = min(available, total)
    swap = values.get(b"SwapTotal")
    swap_free = values.get(b"SwapFree")
    # In containers and some kernels more memory is free than exists.
    swap_used = None if swap is None or swap_free is None else max(0, swap - swap_free)
    return total, available, swap, swap_used


def _floats(content):
    """Return up to three numbers at the beginning of a file; none is negative, infinite or NaN."""
    found = []
    for field in compat.to_text(content).split()[:3]:
        if not compat.is_digits(field.replace(".", "", 1)) or len(field) > 20:
            break
        found.append(float(field))
    return found


def _file_systems(proc, root):
    found = []
    for device, point, kind, is_read_only, figures in kernel.file_systems(proc, root):
        entry = {"device": device, "mountpoint": point, "type": kind, "read_only": is_read_only}
        if figures and len(found) < LIST_LIMIT:
            total, free, available = [figures[1] * figures[at] // 1024 for at in (2, 3, 4)]
            entry["total_kb"] = total
            entry["used_kb"] = max(0, total - free)
            entry["available_kb"] = min(available, total)
            found.append(entry)
    return found


def _disks(proc):
    names = ("reads", None, "read_bytes", "read_ms", "writes", None, "written_bytes", "write_ms")
    names += ("in_progress", "busy_ms")
    return _table(names, kernel.disks(proc))


def _networks(proc):
    names = ("bytes", "packets", "errors", "dropped", None, None, None, None)
    names = [name and "receive_" + name for name in names] + [
        name and "transmit_" + name for name in names
    ]
    return _table(names, kernel.networks(proc))


def _table(names, rows):
    found = {}
    for row, counters in rows:
        if len(found) < LIST_LIMIT:
            pairs = [pair for pair in zip(names, counters) if pair[0]]
            found[row] = dict([(n, v * 512 if n in _SECTORS else v) for n, v in pairs])
    return found


def _pressure(proc):
    found = {}
    for name in ("cpu", "io", "memory"):
        for kind, words in kernel.pressure(proc, name):
            keys = [key for key in words if key != "total" and _floats(words[key])]
            values = dict([(key, _floats(words[key])[0]) for key in keys])
            values["total_us"] = int(words["total"])
            if len(values) == len(words):
                found.setdefault(name, {})[kind] = values
    return found


class Metrics(object):
    """The guest's figures; ``tick`` samples the processors once a second."""

    def __init__(self, proc, root, clock):
        self._proc = proc
        self._root = root
        self._samples = []
        self._usage = None  # the result of the samples, once it was requested
        self._more = None
        self._due = clock()

    def tick(self, now):
        """Take a sample if one is due; return the time of the next."""
        if now >= self._due:
            sample = read_bounded(self._proc + "/stat", STAT_LIMIT)
            sample = sample[: sample.rfind(b"\n") + 1].split(b"\nintr")[0]
            is_one = sample.startswith(b"cpu")
            self._samples = (self._samples + [sample])[-WINDOW - 1 :] if is_one else []
            self._usage = self._more = None
            self._due = now + SAMPLE_SECONDS
        return self._due

    def read(self):
        """Return the answer of ``GET /metrics`` as a jsonio.Written.

        The processor figures cover the last five seconds, or before the second sample
        the time since the guest booted. Figures beyond the specification are read at
        most once a second.
        """
        total, available, swap, swap_used = parse_memory(read_bounded(self._proc + "/meminfo"))
        used = percent = None
        if total and available is not None:
            used = total - available
            percent = round(100.0 * used / total, 1)
        uptime = _floats(read_bounded(self._proc + "/uptime", 128))
        load = (_floats(read_bounded(self._proc + "/loadavg", 128)) + [None] * 3)[:3]
        if self._usage is None:
            self._usage = self._cpu_usage()
            more = {"load_average_5": load[1], "load_average_15": load[2]}
            more["swap_total_kb"], more["swap_used_kb"] = swap, swap_used
            self._more = jsonio.dumps(self._read_more(more))[1:]
        answer = {
            "cpu_usage_percent": self._usage.get("cpu"),
            "memory_usage_percent": percent,
            "memory_used_kb": used,
            "memory_total_kb": total,
            "memory_available_kb": available,
            "uptime_seconds": int(uptime[0]) if uptime else None,
            "load_average": load[0],
            "process_count": self._count_processes(),
        }
        return jsonio.Written(jsonio.dumps(answer)[:-1] + "," + self._more)

    def _read_more(self, more):
        """Add the expensive figures to a dict."""
        ways = {
            "cpus": lambda: dict([pair for pair in self._usage.items() if pair[0] != "cpu"]),
            "file_systems": lambda: _file_systems(self._proc, self._root),
            "disks": lambda: _disks(self._proc),
            "networks": lambda: _networks(self._proc),
            "pressure": lambda: _pressure(self._proc),
        }
        for name, way in ways.items():
            try:
                more[name] = way() or None
            except (ValueError, KeyError, IndexError):  # unexpected text
                more[name] = None
        return more

    def _cpu_usage(self):
        if not self._samples:
            return {}
        before = parse_cpus(self._samples[0]) if self._samples[1:] else {}
        after = parse_cpus(self._samples[-1])
        return dict([(key, cpu_usage(before.get(key, [0] * 8), after[key])) for key in after])

    def _count_processes(self):
        count = 0
        try:
            for name in compat.list_names(self._proc):
                if name.isdigit():
                    count += 1
        except OSError:
            pass
        return count or None
