"""The agent's log: one ASCII line per event, on stderr or in a file of bounded size."""

import os
import select
import time

from . import compat

FILE_LIMIT = 1024 * 1024
BURST = 20
BURST_SECONDS = 60
LINE_LIMIT = 4000  # a pipe with room takes at least so much
# Numbers for the names that MicroPython lacks.
_APPEND = os.O_WRONLY | os.O_NONBLOCK | getattr(os, "O_APPEND", 1024) | getattr(os, "O_CREAT", 64)
_TRUNCATE = getattr(os, "O_TRUNC", 512)


def printable(text):
    """Return the text as one line of ASCII, so that it cannot forge log lines."""
    codes = compat.code_points(text)
    return "".join([chr(code) if 32 <= code < 127 else "\\u%04x" % code for code in codes])


class Log(object):
    """Write to stderr, or append to ``path`` and rename it to ``path``.1 beyond ``limit`` bytes.

    If the folder belongs to another user the file cannot be renamed, and is emptied
    instead.

    The file is opened for each line, so an outside log rotation works too. A line that
    cannot be written at once is dropped, for instance if a pipe is full or a FIFO has
    no reader: logging never blocks the agent.
    """

    def __init__(self, path=None, limit=FILE_LIMIT):
        self._path = path and compat.to_path(path)
        self._limit = limit
        self._seen = {}
        self._window = None
        self._count = 0
        self._clock = compat.Clock()

    def send_to(self, path):
        """Continue in another file, or on stderr if it cannot be opened."""
        path = compat.to_path(path)
        try:
            os.close(os.open(path, _APPEND, 0o666))
        except OSError as error:
            shown = compat.to_text(path), compat.describe_error(error)
            text = "cannot open log file %s: %s" % shown
            self.changed("log file", text, self.warning)
            return
        self._path = path

    def give_to(self, uid, gid):
        """Let a user write to the file after this process has become that user."""
        try:
            if self._path:
                os.chown(self._path, uid, gid)
        except OSError:
            pass  # its lines are then dropped, like every line that cannot be written

    def info(self, text):
        self._write("info", text)

    def warning(self, text):
        self._write("warning", text)

    def error(self, text):
        self._write("error", text)

    def changed(self, subject, text, write=None):
        """Log only if the last line about the subject had another text."""
        if self._seen.get(subject) != text:
            self._seen[subject] = text
            (write or self.info)(text)

    def limited(self, text):
        """Log a warning that a client can cause, at most 20 of those a minute."""
        now = self._clock()
        if self._window is None or now - self._window >= BURST_SECONDS:
            if self._count > BURST:
                self.warning("%d similar messages suppressed" % (self._count - BURST))
            self._window = now
            self._count = 0
        self._count += 1
        if self._count <= BURST:
            self.warning(text)

    def _write(self, level, text):
        stamp = "%04d-%02d-%02dT%02d:%02d:%02dZ" % tuple(time.gmtime(int(time.time()))[:6])
        line = "%s guest-agent: %s: %s" % (stamp, level, printable(text))
        line = compat.to_bytes(line[:LINE_LIMIT] + "\n")
        try:
            if self._path:
                self._append(line)
            elif _has_room(2):
                os.write(2, line)
        except compat.SOCKET_ERRORS:
            pass

    def _append(self, line):
        mode = _APPEND
        try:
            if os.stat(self._path)[6] + len(line) > self._limit:
                mode |= _TRUNCATE  # if it cannot be renamed, empty it
                os.rename(self._path, self._path + compat.to_path(".1"))
        except OSError:
            pass
        out = os.open(self._path, mode, 0o666)
        try:
            os.write(out, line)
        finally:
            os.close(out)


def _has_room(descriptor):
    """Return whether a line can be written without blocking; others may share the file's flags."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool([event for event in poll.poll(0) if event[1] & select.POLLOUT])
