"""The HTTP server: one poll over non-blocking sockets, no threads.

A client can only harm itself: every connection has a deadline, limits apply to what it
sends and leaves unread, and an exception while serving it only closes its connection.
"""

import os
import select

from . import access, compat, config, http, jsonio, tasks
from .compat import socket

WORK_SECONDS = 120.0
REQUEST_SECONDS = 10.0  # seconds for receiving a request, and for sending an answer
IDLE_SECONDS = 30.0  # seconds between two requests of a connection
ACCEPT_PAUSE_SECONDS = 1.0
PENDING_LIMIT = 16384  # bytes that a client may send during its action
ANSWERS_LIMIT = 4096  # unsent bytes, above which no more requests are answered
ACCEPT_BURST = 16
RECEIVE_SIZE = 4096
GIVE_WAY_SECONDS = 1.0
LINGER_SECONDS = 1.0  # seconds for sending a refusal


class _Connection(object):
    def __init__(self, sock, now):
        self.sock = sock
        self.fd = sock.fileno()
        self.received = b""
        self.pending = b""
        self.request = None  # a request that waits for its body or its action
        self.stream = None  # further pieces of the pending answer
        self.is_chunked = False
        self.skip = 0  # bytes of a request body still to be discarded
        self.closing = False  # close after the pending answer
        # The client may still be sending: closing now would reset the
        # connection and could destroy the answer before it is read (RFC 9112,
        # section 9.6), so incoming data is discarded for a moment.
        self.lingering = False
        self.since = now
        self.deadline = now + REQUEST_SECONDS

    def is_idle(self):
        busy = self.received or self.pending or self.skip or self.lingering or self.request
        return not (busy or self.stream)


def open_listeners(listen, port):
    """Return listening sockets, one for each listen address, or one for all addresses.

    Raises OSError (socket.error on Python 2) or ValueError if one cannot be had.
    """
    listeners = []
    try:
        for where in listen or [""]:
            listeners += [_open(where, port)]
        for listener in listeners:  # a peer that one accepts may use all
            listener.listen(64)
    except Exception:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _open(where, port):
    if where.startswith("unix:"):
        return _listen_on_path(*config.parse_unix(where))
    if where.startswith("vsock:"):
        return _bind(compat.AF_VSOCK, compat.vsock_address(*config.parse_vsock(where)))
    if where:
        family, address = compat.resolve(config.parse_host(where), port)[0]
        return _bind(family, address)
    try:  # IPv6 and IPv4
        return _bind(socket.AF_INET6, compat.resolve("::", port)[0][1], dual=True)
    except compat.SOCKET_ERRORS as error:
        if compat.errno_of(error) == compat.EADDRINUSE:
            raise
        # No IPv6 in this kernel, or switched off.
        return _bind(socket.AF_INET, compat.resolve("0.0.0.0", port)[0][1])


def _listen_on_path(path, mode):
    """Return a Unix socket; replace an existing socket only if no process listens on it."""
    path, address = compat.to_path(path), compat.unix_address(path)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(address)
    except compat.SOCKET_ERRORS as error:
        # A file that is not a socket refuses connections, too.
        if compat.errno_of(error) == compat.ECONNREFUSED and os.stat(path)[0] & 0xF000 == 0xC000:
            os.remove(path)
    finally:
        probe.close()
    mask = os.umask(0o777 & ~mode)
    try:
        return _bind(socket.AF_UNIX, address)
    finally:
        os.umask(mask)


def _bind(family, address, dual=False):
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        compat.close_on_exec(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            sock.setsockopt(compat.IPPROTO_IPV6, compat.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.setblocking(False)
    except Exception:
        sock.close()
        raise
    return sock


class Server(object):
    """Serve ``routes``, a dict of path to a function from a request to the answer.

    The answer is a value for JSON, or an http.Stream. ``actions`` is a dict of path to
    a function that changes the guest, one at a time: it takes a request's body and an
    Outcome and returns a task, whose output is the answer. ``settings`` decides who may
    connect; it may be replaced while serving.
    """

    def __init__(self, listeners, routes, actions, settings, log, clock, wake=None):  # noqa: PLR0913, PLR0917
        self.settings = settings
        self._listeners = {}
        for listener in listeners:
            self._listeners[listener.fileno()] = listener
        self._routes = routes
        self._actions = actions
        self._task = None  # (connection, flow, outcome) of the action that is under way
        self._task_due = 0.0
        self._log = log
        self._clock = clock
        self._connections = {}
        self._poll = select.poll()
        self._accept_at = None  # when to accept again after the system ran out of resources
        self._watch_listeners()
        if wake is not None:
            self._poll.register(wake, select.POLLIN)

    def wait(self, seconds):
        """Serve requests for some seconds; return early if anything arrived."""
        try:
            events = self._poll.poll(int(max(0.0, seconds) * 1000) + 1)
        except compat.SOCKET_ERRORS as error:
            if compat.errno_of(error) != compat.EINTR:
                raise
            return
        ready = []
        for event in events:
            if event[0] in self._listeners:
                ready.append(self._listeners[event[0]])
            elif event[0] in self._connections:
                self._serve(self._connections[event[0]])
        for listener in ready:  # last: serve existing clients before accepting new ones
            self._accept(listener)

    def tick(self, now):
        """Close overdue connections; return the time of the next necessary call."""
        for connection in list(self._connections.values()):
            if now >= connection.deadline:
                self._drop(connection)
        if self._task and now >= self._task_due:
            self._advance(now)
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._watch_listeners()
        times = [connection.deadline for connection in self._connections.values()]
        if self._accept_at is not None:
            times.append(self._accept_at)
        if self._task:
            times.append(self._task_due)
        return min(times) if times else now + IDLE_SECONDS

    def close(self):
        """Close every connection and the listening socket."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        for listener in self._listeners.values():
            listener.close()
        if self._task:
            self._task[1].close()

    def _watch_listeners(self):
        for descriptor in self._listeners:
            self._poll.register(descriptor, select.POLLIN)

    def _accept(self, listener):
        for _ in range(ACCEPT_BURST):
            try:
                sock, peer = compat.accept(listener)
            except compat.SOCKET_ERRORS as error:
                code = compat.errno_of(error)
                if code not in (compat.EAGAIN, compat.EINTR):
                    self._log.limited("accept: " + compat.describe_error(error))
                    self._pause_accepting()
                return
            try:
                sock.setblocking(False)
                compat.close_on_exec(sock)
                compat.send_at_once(sock)
                if not access.is_allowed(self.settings.allow, peer):
                    self._log.limited("a client that ALLOW does not name was turned away")
                    sock.close()
                    continue
                if len(self._connections) >= compat.CONNECTION_LIMIT and not self._make_room():
                    sock.close()
                    continue
                connection = _Connection(sock, self._clock())
                self._connections[connection.fd] = connection
                self._poll.register(connection.fd, select.POLLIN)
            except Exception as error:
                self._log.limited("accept: " + compat.describe_error(error))
                sock.close()

    def _pause_accepting(self):
        # Out of descriptors or memory: the listener stays readable, so polling it would spin.
        self._make_room()
        for descriptor in self._listeners:
            self._poll.unregister(descriptor)
        self._accept_at = self._clock() + ACCEPT_PAUSE_SECONDS

    def _make_room(self):
        """Close the connection that has been idle longest, else that of the slowest request."""
        now = self._clock()
        waiting = [each for each in self._connections.values() if each.is_idle()]
        if not waiting:
            waiting = [
                each
                for each in self._connections.values()
                if each.lingering or now - each.since > GIVE_WAY_SECONDS
            ]
        if not waiting:
            return False
        self._drop(min(waiting, key=lambda each: each.since))
        return True

    def _serve(self, connection):
        try:
            if connection.pending:
                self._send(connection)
            else:
                self._receive(connection)
        except compat.SOCKET_ERRORS as error:
            if compat.errno_of(error) not in (compat.EAGAIN, compat.EINTR):
                self._drop(connection)  # do not log a client that went away
        except Exception as error:
            self._drop(connection)
            self._log.limited("while serving: " + compat.describe_error(error))

    def _receive(self, connection):
        data = connection.sock.recv(RECEIVE_SIZE)
        if not data:
            self._drop(connection)
        elif not connection.lingering:
            if connection.is_idle():
                connection.since = self._clock()
                connection.deadline = connection.since + REQUEST_SECONDS
            connection.received += data
            if len(connection.received) > PENDING_LIMIT:
                self._drop(connection)
            else:
                self._answer(connection)

    def _answer(self, connection):
        """Answer the received requests, as long as the client reads the answers."""
        while not (connection.closing or connection.stream) and (
            len(connection.pending) < ANSWERS_LIMIT
        ):
            take = self._take_order if connection.request else self._take_request
            try:
                if not take(connection):
                    break
            except http.RequestError as error:
                connection.request = None
                connection.pending += http.render(error.args[0], {"error": error.args[1]})
                connection.closing = connection.lingering = True
        if connection.pending:
            self._send(connection)

    def _take_request(self, connection):
        """Answer the next request, or keep it until its body is there; False if there is none."""
        if connection.skip:
            skipped = min(connection.skip, len(connection.received))
            connection.skip -= skipped
            connection.received = connection.received[skipped:]
            if connection.skip:
                return False
        head, connection.received = http.take_head(connection.received)
        if head is None:
            return False
        request = http.parse_head(head)
        is_order = request.path in self._actions
        if is_order and request.body_length > http.ORDER_LIMIT:
            raise http.RequestError(413, "request body too long")
        if request.is_waiting and not connection.received:
            connection.pending += http.CONTINUE
        if is_order or request.chunks:
            connection.request = request
        else:
            connection.skip = request.body_length
            self._reply(connection, request)
        return True

    def _reply(self, connection, request):
        status, answer, allow = self._respond(request)
        if isinstance(answer, http.Stream):
            connection.is_chunked = not request.is_old
            if request.is_old:
                request.keep_alive = False
            if request.method != b"HEAD":
                connection.stream = answer.pieces
        connection.pending += http.render(status, answer, request, request.keep_alive, allow)
        if not request.keep_alive:
            connection.closing = True
            connection.lingering = connection.skip > len(connection.received)

    def _is_begun(self, connection):
        return bool(self._task and self._task[0] is connection)

    def _take_order(self, connection):
        """Start the action of a complete request; False if there is nothing to answer."""
        request = connection.request
        if self._is_begun(connection):
            return False
        if request.chunks:
            connection.received = request.chunks.take(connection.received)
            if not request.chunks.is_whole:
                return False
            body = request.chunks.body
        elif len(connection.received) < request.body_length:
            return False
        else:
            body = connection.received[: request.body_length]
            connection.received = connection.received[request.body_length :]
        if request.path not in self._actions:
            connection.request = None
            self._reply(connection, request)
            return True
        if len(body) > http.ORDER_LIMIT:
            raise http.RequestError(413, "request body too long")
        refusal = self._refusal(request)
        if refusal:
            self._finish(connection, *refusal)
            return True
        outcome = tasks.Outcome()
        self._task = (connection, self._actions[request.path](body, outcome), outcome)
        self._task_due = self._clock()
        connection.deadline = self._task_due + WORK_SECONDS
        return False

    def _refusal(self, request):
        """Return the status and answer that refuse a change of the guest, or None."""
        if request.method != b"POST":
            return 405, {"error": "method not allowed"}
        if not self.settings.configure or not self.settings.token:
            return 403, {"error": "not allowed: it takes ALLOW_CONFIGURE=yes and TOKEN"}
        if not access.shows(request.fields.get(b"authorization", ()), self.settings.token):
            return 401, {"error": "TOKEN is required"}
        return (503, {"error": "another change is under way"}) if self._task else None

    def _finish(self, connection, status, answer):
        request, connection.request = connection.request, None
        allow = "POST" if status == 405 else None
        connection.pending += http.render(status, answer, request, request.keep_alive, allow)
        connection.closing = not request.keep_alive

    def _advance(self, now):
        """Continue the current action, even if its client has gone."""
        connection, flow, outcome = self._task
        try:
            pause = next(flow)
        except StopIteration:
            status, answer = 200, outcome.output
        except Exception as error:
            self._log.limited("%s: %s" % (connection.request.path, compat.describe_error(error)))
            status, answer = 500, {"error": "internal error"}
        else:
            self._task_due = now + pause
            return
        self._task = None
        self._log.info("%s: %s" % (connection.request.path, jsonio.dumps(answer)))
        if self._connections.get(connection.fd) is connection:
            self._finish(connection, status, answer)
            self._serve(connection)

    def _respond(self, request):
        """Return the status, the answer and the value of an Allow header, if any."""
        route = self._routes.get(request.path)
        status, allow = 200, None
        if not self._may_read(request.fields.get(b"authorization", ())):
            status, answer = 401, {"error": "a token is required"}
        elif route is None:
            status, answer = 404, {"error": "not found"}
        elif request.method not in (b"GET", b"HEAD"):
            status, answer, allow = 405, {"error": "method not allowed"}, "GET, HEAD"
        else:
            try:
                answer = route(request)
            except Exception as error:
                self._log.limited("%s: %s" % (request.path, compat.describe_error(error)))
                status, answer = 500, {"error": "internal error"}
        return status, answer, allow

    def _may_read(self, shown):
        wanted = self.settings.read_token
        if wanted is None:
            return True
        return access.shows(shown, wanted) or access.shows(shown, self.settings.token)

    def _send(self, connection):
        try:
            sent = connection.sock.send(connection.pending)
        except compat.SOCKET_ERRORS as error:
            if compat.errno_of(error) not in (compat.EAGAIN, compat.EINTR):
                raise
            sent = 0
        connection.pending = connection.pending[sent:]
        if connection.stream and not connection.pending:
            self._continue(connection)
        if connection.pending:
            self._poll.register(connection.fd, select.POLLOUT)
            return
        self._poll.register(connection.fd, select.POLLIN)
        now = connection.since = self._clock()
        if connection.lingering:
            connection.deadline = now + LINGER_SECONDS
            compat.stop_sending(connection.sock)
        elif connection.closing:
            self._drop(connection)
        elif not self._is_begun(connection):
            is_busy = connection.received or connection.skip or connection.request
            connection.deadline = now + (REQUEST_SECONDS if is_busy else IDLE_SECONDS)
            if connection.received:
                self._answer(connection)

    def _continue(self, connection):
        """Take the next piece of a stream; it is sent after other clients' turns."""
        piece = next(connection.stream, None)
        if piece is None:
            connection.stream = None
        if connection.is_chunked:
            piece = http.chunk(piece or b"")
        connection.pending = piece or b""

    def _drop(self, connection):
        if connection.stream:
            connection.stream.close()
            connection.stream = None
        if self._connections.pop(connection.fd, None) is not None:
            self._poll.unregister(connection.fd)
            connection.sock.close()
