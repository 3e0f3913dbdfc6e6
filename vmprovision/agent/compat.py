"""Every difference between the interpreters the agent runs on.

The rest of the package uses only the subset that CPython 2.6 to 3.14 and MicroPython
share. This module has everything else. ``novermin`` marks features that only newer
interpreters have. MicroPython is the
bundled runtime, whose os, signal and fcntl have what is used here. It has no
os.path, getsockopt or strftime, decodes UTF-8 only, does not call signal
handlers, and its socket addresses are opaque bytes; Python 2 has bytes for
``str`` and no monotonic clock.
"""

import errno
import fcntl
import os
import select
import sys
import time

# CPython's socket and signal modules are wrappers that import enum, collections and selectors,
# which would take more than a megabyte in every guest.
try:
    import _socket as socket
except ImportError:  # MicroPython
    import socket
try:
    import _signal as signal
except ImportError:  # MicroPython, Python 2, Python 3.4 and earlier
    import signal
try:
    import _guest
except ImportError:  # CPython
    _guest = None

try:
    INTEGERS = (int, long)  # novermin
    UNICODE = unicode  # novermin
except NameError:  # Python 3 and MicroPython
    INTEGERS = (int,)
    UNICODE = str

SOCKET_ERRORS = (OSError, getattr(socket, "error", OSError), getattr(select, "error", OSError))
try:
    FILE_ERRORS = (OSError, IOError)
except NameError:  # MicroPython
    FILE_ERRORS = (OSError,)

EAGAIN = errno.EAGAIN
EACCES = errno.EACCES
ENOENT = errno.ENOENT
ECONNREFUSED = errno.ECONNREFUSED
EINPROGRESS = errno.EINPROGRESS
EADDRINUSE = errno.EADDRINUSE
EINTR = getattr(errno, "EINTR", 4)
# The manager, or the network to it, is down; MicroPython names only some of these.
UNREACHED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH)
UNREACHED += (getattr(errno, "ENETUNREACH", 101), getattr(errno, "EPIPE", 32))
UNREACHED += (getattr(errno, "EAFNOSUPPORT", 97), getattr(errno, "EADDRNOTAVAIL", 99))
EMFILE = getattr(errno, "EMFILE", 24)
ENFILE = getattr(errno, "ENFILE", 23)

IPPROTO_IPV6 = 41
IPV6_V6ONLY = 26
AF_VSOCK = 40

IS_MICROPYTHON = getattr(getattr(sys, "implementation", None), "name", "") == "micropython"

# MicroPython runs in a heap of half a megabyte: fewer clients, each worth up to 16 KiB of it.
CONNECTION_LIMIT = 16 if IS_MICROPYTHON else 64
# The limit for mounts, and for devices of a kind.
ROW_LIMIT = 128 if IS_MICROPYTHON else 1024

# MicroPython allocates the requested size, so files are read in pieces of this size.
READ_SIZE = 4096
# O_RDWR | O_CREAT | O_EXCL, which MicroPython does not name: the numbers of its processors.
_NEW_FILE = 2 | getattr(os, "O_CREAT", 64) | getattr(os, "O_EXCL", 128)
COMMAND_OUTPUT_LIMIT = 16384 if IS_MICROPYTHON else 65536
_DRAIN_READS = 32  # twice a pipe's size: a limit for endless writers
# Services often have no sbin folders in their PATH, and ip and ifconfig live there.
COMMAND_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def load(name):
    """Return a module that is rarely needed; the archive has those in a separate member."""
    package = sys.modules[__name__.rpartition(".")[0]]
    if not hasattr(package, name):
        if hasattr(package, "unpack"):
            package.unpack(name)
        else:
            __import__("%s.%s" % (package.__name__, name))
    return getattr(package, name)


def runtime_name():
    """Return the interpreter and its version, such as ``MicroPython 1.25.0``."""
    implementation = getattr(sys, "implementation", None)
    name = getattr(implementation, "name", "cpython")
    if IS_MICROPYTHON:
        return "MicroPython " + ".".join([str(part) for part in implementation.version[:3]])
    shown = {"cpython": "CPython", "pypy": "PyPy"}.get(name, name)
    return "%s %d.%d.%d" % ((shown,) + tuple(sys.version_info[:3]))


def errno_of(error):
    """Return the number in an OSError, IOError, socket.error or select.error, or None."""
    if error.args and isinstance(error.args[0], INTEGERS):
        return error.args[0]
    return None


def describe_error(error):
    """Return one line about an exception for the log, without a traceback."""
    code = errno_of(error)
    if code is not None and code < 0:  # getaddrinfo(3) has its own numbers
        return str(error.args[1])
    if code is not None:
        return os.strerror(code)
    if str(error)[:10] == "[addrinfo ":  # MicroPython's form of those
        return "the name is not known %s" % error
    return "%s: %s" % (type(error).__name__, error)


# --- text ---------------------------------------------------------------------------------------


def to_text(data):
    """Return bytes as the interpreter's own ``str``; undecodable bytes become question marks."""
    if not isinstance(data, bytes):
        return data
    try:
        text = data.decode("utf-8")
    except (UnicodeError, ValueError):
        return "".join([chr(byte) if byte < 128 else "?" for byte in bytearray(data)])
    return data if bytes is str else text


def to_bytes(text):
    """Return text as UTF-8 bytes, and bytes unchanged."""
    if isinstance(text, bytes):
        return text
    if IS_MICROPYTHON:
        return text.encode()
    # A lone surrogate (from the environment) has no UTF-8 form.
    return text.encode("utf-8", "replace")


def to_path(text):
    """Return a path in the form that system calls need in any locale.

    CPython up to 3.6 has only ASCII in the C locale; other bytes become surrogates.
    """
    if isinstance(text, bytes) or IS_MICROPYTHON:
        return text
    return text.encode("utf-8", "surrogateescape")


def is_digits(text):
    """Return whether the text is ASCII digits only; Python 3's isdigit() accepts other scripts."""
    return bool(text) and not text.strip("0123456789")


def code_points(text):
    """Return the code points (UTF-16 units on a narrow build) of a ``str`` of any kind."""
    if not isinstance(text, UNICODE):
        text = text.decode("utf-8", "replace")
    return [ord(character) for character in text]


def machine():
    """Return the kernel's name for this kind of machine, such as ``x86_64``."""
    return os.uname()[4]


# --- clocks -------------------------------------------------------------------------------------


class Clock(object):
    """Seconds that only go forward, even if the wall clock jumps.

    A guest's wall clock jumps when time synchronisation starts. Python 2 has no
    monotonic clock, but ``times(2)`` behind os.times() is one.
    """

    def __init__(self):
        self._elapsed = 0.0
        self._last = self._raw()

    def _raw(self):
        if IS_MICROPYTHON:
            return time.ticks_ms()
        if hasattr(time, "monotonic"):
            return time.monotonic()  # novermin
        return os.times()[4]

    def __call__(self):
        now = self._raw()
        if IS_MICROPYTHON:
            step = time.ticks_diff(now, self._last) / 1000.0
        else:
            step = now - self._last
        self._last = now
        if step > 0:
            self._elapsed += step
        return self._elapsed


def chance(proc):
    """Return a number from 0 to below 1 that differs between calls and machines."""
    try:
        source = open(proc + "/sys/kernel/random/uuid", "rb")
        try:
            return int(source.read(8), 16) / 4294967296.0
        finally:
            source.close()
    except FILE_ERRORS + (ValueError,):
        return time.time() % 1


# --- privileges ---------------------------------------------------------------------------------


class PrivilegeError(Exception):
    """Root's privileges could not be dropped; the argument says why."""


def is_root():
    """Return whether this process is root."""
    return os.geteuid() == 0


def become(uid, gid):
    """Become this user and group for good, without supplementary groups. Raises PrivilegeError."""
    try:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except OSError:
        raise PrivilegeError("cannot become user %d: %s" % (uid, describe_error(sys.exc_info()[1])))
    if os.geteuid() != uid or os.getuid() != uid:
        raise PrivilegeError("cannot become user %d" % uid)


def keep_to_itself():
    """Make inherited process settings harmless; call it before anything else.

    New files are readable only by this user. A parent may have left SIGCHLD ignored;
    then the kernel would keep no child's status.
    """
    os.umask(0o077)
    signal.signal(getattr(signal, "SIGCHLD", 17), signal.SIG_DFL)


# --- files and processes ------------------------------------------------------------------------


def list_names(path):
    """Return the names in a directory, one at a time if the interpreter can."""
    if hasattr(os, "ilistdir"):
        return (entry[0] for entry in os.ilistdir(path))
    return iter(os.listdir(path))


def getenv(name):
    """Return an environment variable as text, or None."""
    try:
        value = os.getenv(name)
    except UnicodeError:  # MicroPython raises it for text that is not UTF-8
        return None
    return value and to_text(to_path(value))


def as_file(descriptor):
    """Return a file object for reading bytes from a descriptor, which it closes."""
    try:
        return getattr(os, "fdopen", open)(descriptor, "rb")
    except FILE_ERRORS:  # for a directory
        os.close(descriptor)
        raise


def open_standard():
    """Open the descriptors 0 to 2 if they are closed; else a socket would get the output.

    Writing to them still fails.
    """
    descriptor = 0
    while descriptor < 3:
        descriptor = os.open("/", 0)  # / always exists; /dev may be mounted later
    os.close(descriptor)


def print_text(text, descriptor=1):
    """Write text to standard output or error, in any locale. Raises OSError."""
    data = to_bytes(text)
    while data:
        data = data[os.write(descriptor, data) :]


def exists(path):
    """Return whether the path exists."""
    try:
        os.stat(to_path(path))
    except OSError:
        return False
    return True


def read_link(path):
    """Return the target of a symbolic link, or None if it cannot be read."""
    try:
        return to_text(os.readlink(to_path(path)))
    except (OSError, UnicodeError):
        return None


def accept(listener):
    """Return the next connection's socket, and the peer's packed IP address or None."""
    if hasattr(listener, "_accept"):  # Python 3's _socket returns a descriptor
        descriptor, peer = listener._accept()  # noqa: SLF001 -- see the import
        sock = socket.socket(fileno=descriptor)
    else:
        sock, peer = listener.accept()
    if hasattr(socket, "sockaddr"):  # MicroPython
        address = socket.sockaddr(peer)
        inet = address[0] in (socket.AF_INET, socket.AF_INET6)
        return sock, address[1] if inet else None
    if isinstance(peer, tuple) and isinstance(peer[0], str):
        return sock, pack_address(peer[0].split("%")[0])
    return sock, None


def pack_address(text):
    """Return an IPv4 or IPv6 address as four or sixteen bytes, or None if it is invalid."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except SOCKET_ERRORS + (ValueError, UnicodeError):
        return None


def unix_address(path):
    """Return the argument of ``bind`` and ``connect`` for a Unix socket, by unix(7)."""
    if not IS_MICROPYTHON:
        return to_path(path)
    return (1).to_bytes(2, sys.byteorder) + to_bytes(path) + b"\0"  # novermin


def vsock_address(cid, port):
    """Return the argument of ``bind`` for vsock(7). Raises ValueError if it is not supported."""
    if IS_MICROPYTHON:
        numbers = (port).to_bytes(4, sys.byteorder) + (cid).to_bytes(4, sys.byteorder)  # novermin
        family = (AF_VSOCK).to_bytes(2, sys.byteorder)  # novermin
        return family + b"\0\0" + numbers + b"\0\0\0\0"
    if not hasattr(socket, "AF_VSOCK"):
        raise ValueError("vsock needs Python 3.7 or later")
    return (cid, port)


def close_on_exec(sock):
    """Keep child programs from inheriting a socket."""
    flags = fcntl.fcntl(sock.fileno(), fcntl.F_GETFD)
    fcntl.fcntl(sock.fileno(), fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)


def send_at_once(sock):
    """Send pieces without waiting for the acknowledgement of the last one (RFC 896)."""
    try:
        sock.setsockopt(6, 1, 1)  # IPPROTO_TCP, TCP_NODELAY
    except SOCKET_ERRORS:
        pass  # not a TCP socket


def _set_nonblocking(descriptor):
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)


def unnamed_file(content=b""):
    """Return a file open for writing and reading that has no name any more.

    While it has a name, only this user may open it, whatever the umask is: it may hold
    a token. O_EXCL neither follows a link nor opens an existing file. Raises OSError if
    no directory can be used.
    """
    shared = ("/run", "/var/run", "/dev/shm", "/tmp")  # noqa: S108 -- see above
    for parent in (getenv("RUNTIME_DIRECTORY"),) + shared:
        if not parent:
            continue
        name = "%s/.guest-agent-%d" % (parent, int(time.time() * 1000000))
        try:
            descriptor = os.open(name, _NEW_FILE, 0o600)
        except OSError:
            continue
        os.remove(name)
        unnamed = getattr(os, "fdopen", open)(descriptor, "w+b")
        try:
            unnamed.write(content)
            unnamed.flush()
            unnamed.seek(0)
        except FILE_ERRORS:  # the filesystem is full
            unnamed.close()
            continue
        return unnamed
    raise OSError(EACCES, "no directory for temporary files")


class Child(object):
    """A program, or a function, that runs in a child process without blocking this one.

    ``poll()`` returns None while it runs, then ``(status, output)``. ``kill()`` ends it
    and everything that it started. A function gets no arguments and returns bytes.
    Raises OSError, and leaves nothing open, if no process can be started.
    """

    def __init__(self, argv=None, stdin=b"", function=None):
        self._output = b""
        # wget reads its configuration from a file, but not from a pipe.
        source = unnamed_file(stdin) if stdin else open("/dev/null", "rb")
        ends = ()
        try:
            ends = os.pipe()
            _set_nonblocking(ends[0])
            self._pid = os.fork()
            if self._pid == 0:
                self._become(argv, function, source.fileno(), ends[1])
        except Exception:  # no more processes, descriptors or memory
            if ends:
                os.close(ends[0])
            raise
        finally:
            source.close()
            if ends:
                os.close(ends[1])
        self._out = ends[0]

    def _become(self, argv, function, source, write_out):
        status = 127
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.umask(0o022)  # files of a DHCP client or an installer are for everybody
            os.setpgid(0, 0)
            os.dup2(source, 0)
            os.dup2(write_out, 1)
            null = os.open("/dev/null", os.O_WRONLY)
            os.dup2(null, 2)
            os.closerange(3, 1024)
            if function:
                os.write(1, function())
                status = 0
            else:
                environment = program_environment(os.environ)
                os.execvpe(argv[0], argv, environment)  # noqa: S606 -- that is safer than with one
        finally:
            os._exit(status)

    def _drain(self):
        for _ in range(_DRAIN_READS):
            try:
                data = os.read(self._out, READ_SIZE)
            except OSError:
                return
            if not data:
                return
            if len(self._output) < COMMAND_OUTPUT_LIMIT:
                self._output += data

    def poll(self):
        self._drain()
        pid, status = _wait_for(self._pid, os.WNOHANG)
        if pid == 0:
            return None
        self._drain()
        os.close(self._out)
        return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128, self._output)

    def kill(self):
        for kill in (os.killpg, os.kill):
            try:
                kill(self._pid, signal.SIGKILL)
            except OSError:  # setpgid may not have happened yet
                pass
        _wait_for(self._pid, 0)
        os.close(self._out)


def _wait_for(pid, options):
    """Return waitpid(2)'s result, or a signal's status if the kernel has kept none."""
    while True:
        try:
            return os.waitpid(pid, options)
        except OSError as error:
            if errno_of(error) != EINTR:
                return pid, 9


def program_environment(environment):
    """Return the environment for child programs: the C locale, and nothing secret.

    An empty or relative word in PATH would run programs in the current directory.
    """
    secret = ("TOKEN", "READ_TOKEN")
    names = [name for name in environment if name[:12] != "GUEST_AGENT_" and name not in secret]
    kept = dict([(name, environment[name]) for name in names])
    kept["LC_ALL"] = kept["LANG"] = "C"
    folders = [folder for folder in kept.get("PATH", "").split(":") if folder[:1] == "/"]
    kept["PATH"] = ":".join(folders + [COMMAND_PATH])
    return kept


# --- network ------------------------------------------------------------------------------------


def resolve(host, port):
    """Return the TCP addresses of a host: a list of ``(family, socket address)``.

    Blocks while a name is looked up; numeric addresses never block. The host
    is passed as bytes because CPython would import its idna codec for text.
    """
    found = socket.getaddrinfo(to_bytes(host), port, 0, socket.SOCK_STREAM)
    return [(entry[0], entry[4]) for entry in found if entry[1] == socket.SOCK_STREAM]


def lookup_function(host, port):
    """Return a function for Child that looks up a host; ``parse_lookup`` reads its output."""

    def look_up():
        return to_bytes("".join([numeric_host(each) + "\n" for each in resolve(host, port)]))

    return look_up


def numeric_host(target):
    """Return the numeric address in an item from ``resolve``."""
    family, address = target
    if IS_MICROPYTHON:
        return socket.inet_ntop(family, socket.sockaddr(address)[1])
    return address[0]


def parse_lookup(output, port):
    """Return the ``(family, socket address)`` list in the output of a ``lookup_function``."""
    return [found for host in to_text(output).split() for found in resolve(host, port)]


def stop_sending(sock):
    """Tell the peer that no more data follows."""
    try:
        if _guest:
            _guest.shutdown(sock.fileno(), 1)
        else:
            sock.shutdown(1)
    except SOCKET_ERRORS:
        pass


class Signals(object):
    """Turn SIGTERM and SIGINT into ``stopped``, and SIGHUP into ``reload``.

    ``fileno`` becomes readable when a signal arrives, so that a poll returns which
    Python 3.5 and later would restart silently (PEP 475). MicroPython only writes the
    signals' numbers there; this class does the rest.
    """

    def __init__(self):
        self.stopped = False
        self.reload = False
        self.fileno, self._write = os.pipe()
        for descriptor in (self.fileno, self._write):
            _set_nonblocking(descriptor)
            fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        signal.set_wakeup_fd(self._write)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if number == signal.SIGHUP:
            self.reload = True
        else:
            self.stopped = True

    def clear(self):
        """Empty the pipe behind ``fileno``."""
        try:
            numbers = os.read(self.fileno, 512)
        except OSError:
            return
        if IS_MICROPYTHON:
            for number in numbers:
                self._note(number, None)
