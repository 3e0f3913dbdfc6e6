"""Measures the guest: what ``GET /metrics`` answers, from /proc (proc(5)).

Every figure stands alone: one that the kernel does not offer is None. Works
with kernels from 2.6 on, whose /proc/stat lines are shorter and whose
/proc/meminfo has no MemAvailable.
"""

from . import compat
from .files import read_bounded

SAMPLE_SECONDS = 1.0
WINDOW = 5  # samples before the newest one


def parse_cpu(stat):
    """The tick counters of all processors together from /proc/stat: a list of 4 to 8, or None.

    Counters beyond the eighth (guest, guest_nice) are part of the first two.
    """
    fields = stat.split(b"\n")[0].split()
    if not fields or fields[0] != b"cpu" or len(fields) < 5:
        return None
    try:
        return [int(field) for field in fields[1:9]]
    except ValueError:
        return None


def cpu_usage(before, after):
    """The percentage of time between two readings that was not idle.

    Idle is the fourth counter plus, where the kernel has it, iowait. Steal
    counts as busy: the guest wanted to run. A counter that went back (iowait
    does) counts as unchanged.
    """
    steps = [max(0, new - old) for old, new in zip(before, after)]
    total = sum(steps)
    idle = sum(steps[3:5])
    return round(100.0 * (total - idle) / total, 1) if total else 0.0


def parse_memory(meminfo):
    """Total and available memory in KiB from /proc/meminfo; None for what is not there.

    Before MemAvailable (Linux 3.14) the free, buffer and page cache memory
    stands for it; shared memory sits in the page cache but cannot be dropped.
    """
    values = {}
    for line in meminfo.split(b"\n"):
        name, _, rest = line.partition(b":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            values[name] = int(fields[0])
    total = values.get(b"MemTotal")
    available = values.get(b"MemAvailable")
    if available is None and b"MemFree" in values:
        cache = values.get(b"Buffers", 0) + values.get(b"Cached", 0)
        cache += values.get(b"SReclaimable", 0) - values.get(b"Shmem", 0)
        available = values[b"MemFree"] + max(0, cache)
    if total is not None and available is not None:
        available = min(available, total)
    return total, available


def _first_number(content):
    fields = content.split()
    try:
        return float(fields[0]) if fields else None
    except ValueError:
        return None


class Metrics(object):
    """The guest's figures; ``tick`` samples the processors once a second."""

    def __init__(self, proc, clock):
        self._proc = proc
        self._clock = clock
        self._samples = []
        self._due = clock()

    def tick(self, now):
        """Takes a sample if one is due; gives the time of the next."""
        if now >= self._due:
            sample = parse_cpu(read_bounded(self._proc + "/stat", compat.READ_SIZE))
            self._samples = (self._samples + [sample])[-WINDOW - 1 :] if sample else []
            self._due = now + SAMPLE_SECONDS
        return self._due

    def read(self):
        """What ``GET /metrics`` answers.

        The processor figure covers the last five seconds; before the second
        sample it covers the time since the guest booted.
        """
        total, available = parse_memory(read_bounded(self._proc + "/meminfo"))
        used = percent = None
        if total and available is not None:
            used = total - available
            percent = round(100.0 * used / total, 1)
        uptime = _first_number(read_bounded(self._proc + "/uptime"))
        return {
            "cpu_usage_percent": self._cpu_usage(),
            "memory_usage_percent": percent,
            "memory_used_kb": used,
            "memory_total_kb": total,
            "memory_available_kb": available,
            "uptime_seconds": None if uptime is None else int(uptime),
            "load_average": _first_number(read_bounded(self._proc + "/loadavg")),
            "process_count": self._count_processes(),
        }

    def _cpu_usage(self):
        if not self._samples:
            return None
        if len(self._samples) == 1:
            return cpu_usage([0] * len(self._samples[0]), self._samples[0])
        return cpu_usage(self._samples[0], self._samples[-1])

    def _count_processes(self):
        count = 0
        try:
            for name in compat.list_names(self._proc):
                if name.isdigit():
                    count += 1
        except OSError:
            pass
        return count or None
