"""Prints what the agent's pure functions make of fixed samples; run by every interpreter.

Written in the agent's own subset of the language. ``test_portable`` compares
the output with that of the Python that runs the tests.
"""

# mypy: ignore-errors
# ruff: noqa: C901, PLR0912, ANN001, ANN201, ANN204, ARG002, D101, D102, D103, D107, PERF203, PTH123, SIM115, UP004

import sys

sys.path.insert(0, sys.argv[1])

from guest_agent import (
    addresses,
    compat,
    config,
    delivery,
    exposition,
    guest,
    http,
    identity,
    jsonio,
    kernel,
    log,
    metrics,
)

CONFIGURATION = (
    b"A=1\r\nVM_ID='x y' # c\nPORT=x\nbad\n#c\nexport\tB=\"q\"\nINTERFACE=\xff \xc2\xa0 #"
)
COMMAND_LINES = (
    b'quiet "guest_agent.vm_id=a b" x\n',
    b'guest-agent.vm_id="a b" x="y" "',
    b'guest_agent.vm_id=\xc3\xa9\xff x\t"guest_agent-vm_id=y',
)
ACCEPTS = (
    "*/*",
    "text/plain",
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "text/plain;q=0.2,application/json;q=0.3",
    "text/*,application/json;q=0.9",
    'text/plain;version="1.0.0"',
    "text/plain;q=,text/plain;q=1.5;q=x",
)


def show(name, value):
    sys.stdout.write(name + " " + jsonio.dumps(value) + "\n")


def read(name):
    source = open(sys.argv[2] + "/" + name, "rb")
    try:
        return source.read(100000)
    finally:
        source.close()


def text_of(name):
    return read(name).decode("ascii")


def candidates(found):
    return [[each.address, each.interface, each.temporary] for each in found]


class Collect(object):
    def __init__(self):
        self.lines = []

    def warning(self, text):
        self.lines.append(text)

    def changed(self, subject, text):
        self.lines.append(text)

    limited = warning


def main():
    show("floats", [0.0, 0.1, 1.0, 99.95, 33.333333, -2.5, 1e14, float("inf"), 100.0 / 3])
    show("integers", [0, -1, 2**31, 2**40, 10**18, True, False, None])
    show("text", ["plain", 'q"\\', "\n\t\x00\x1f\x7f", b"\xc3\xa4\xe2\x82\xac\xf0\x9f\x90\xa7"])
    show("printable", log.printable("a\nb\x1b[0m\x7f"))
    for name in sys.argv[3:]:
        if name.startswith("ip-"):
            show(name, candidates(addresses.parse_ip_address(text_of(name))))
        elif name.startswith("ifconfig-"):
            show(name, candidates(addresses.parse_ifconfig(text_of(name))))
        elif name.startswith("route-get-"):
            show(name, candidates(addresses.parse_route_get(text_of(name))))
        elif name.startswith("meminfo-"):
            show(name, metrics.parse_memory(read(name)))
        elif name.startswith("stat-"):
            counters = metrics.parse_cpus(read(name))
            show(name, [counters, metrics.cpu_usage([0] * 8, counters["cpu"])])
    for directory in ("proc-6.1", "proc-2.6.18", "proc-odd"):
        proc = sys.argv[2] + "/../" + directory
        show(directory, list(kernel.disks(proc)))
        show(directory, list(kernel.networks(proc)))
        # statvfs tells of this host, not of the sample
        show(directory, [each[:4] for each in kernel.file_systems(proc, "/nowhere")])
        for resource in ("cpu", "io"):
            show(directory, list(kernel.pressure(proc, resource)))
        figures = metrics.Metrics(proc, "/nowhere", lambda: 0.0)
        figures.tick(0.0)
        show(directory, figures.read())
        text = b"".join(exposition.render(proc, "/nowhere", 'a"b\\c'))
        for line in text.split(b"\n"):
            if b"guest_agent_build" not in line and b"node_time" not in line:
                show(directory, line)
    for accept in ACCEPTS:
        show(accept, http.likes_exposition([accept.encode()]))
    show("environment", [compat.getenv("PORTABLE"), compat.getenv("PORTABLE_BAD") in (None, "w?b")])
    for line in COMMAND_LINES:
        words = identity.split_parameters(line)
        show("parameters", [compat.to_text(word) for word in words])
        show("name", compat.to_text(identity.pick(words, "VM_ID")))
    show("process", guest.parse_process(b"7 (a) (b c)) S 1 7 7 0"))
    show("quote", delivery.quote("web 1/../\\x"))
    show("status", [delivery.parse_status(b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 204 N\r\n")])
    collect = Collect()
    pairs = list(config.parse_pairs(CONFIGURATION, collect))
    show("pairs", pairs)
    settings = config.parse_settings(pairs, collect)
    show("settings", [settings.vm_id, settings.port, collect.lines])
    for head in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"G\xe4T / HTTP/1.0\r\n\r\n", b"x\r\n\r\n"):
        try:
            request = http.parse_head(http.take_head(head)[0])
            show("head", [request.method, request.path, request.keep_alive, request.is_old])
        except http.RequestError as error:
            show("head", list(error.args))


main()
