"""Runs what stands on the command line as CPython does: a zip archive, a file of source, -c CODE.

Called by main.c with its own name and the words behind the options in
``sys.argv``.  Where an archive stands at the end of the interpreter's own file,
that is run, with all words.  An archive may stand behind other bytes, such as
the lines of a launcher, and its members may be stored or deflated (PKWARE's
APPNOTE.TXT).  Nothing is written to disk.
"""

import gc
import io
import os
import struct
import sys

import vfs
from _guest import crc32, inflate

_DIRECTORY = (0x4000,) + (0,) * 9
_END = b"PK\x05\x06"
_END_SIZE = 22
_LONGEST_COMMENT = 65535
_SIZE_LIMIT = 1 << 20
# What has been allocated is collected after so many bytes, not only when the heap is full: the
# pages above are then never touched, and take no memory.
_COLLECT_AFTER = 256 * 1024


class Archive:
    """The members of a zip archive, as the file system that modules are imported from."""

    def __init__(self, source, place, record):
        self._source = source
        self._members = {}
        self._folders = {"": 1}
        count, size, offset = struct.unpack_from("<HII", record, 10)
        start = place - size
        self._before = start - offset
        directory = self._read(start, size)
        at = 0
        for _ in range(count):
            if directory[at : at + 4] != b"PK\x01\x02":
                raise ValueError("damaged zip archive")
            method, check, packed, size = struct.unpack_from("<H4xIII", directory, at + 10)
            name, extra, comment = struct.unpack_from("<HHH", directory, at + 28)
            (offset,) = struct.unpack_from("<I", directory, at + 42)
            path = directory[at + 46 : at + 46 + name].decode()
            self._members[path] = (method, check, packed, size, offset)
            at += 46 + name + extra + comment
            while "/" in path:
                path = path.rsplit("/", 1)[0]
                self._folders[path] = 1

    def _read(self, offset, size):
        self._source.seek(offset)
        return self._source.read(size)

    def read(self, path):
        """The content of a member, checked."""
        method, check, packed, size, offset = self._members[path]
        name, extra = struct.unpack("<HH", self._read(self._before + offset + 26, 4))
        content = self._read(self._before + offset + 30 + name + extra, packed)
        if method == 8 and size <= _SIZE_LIMIT:
            content = inflate(content, size)
        elif method:
            raise ValueError("unknown compression of " + path)
        if len(content) != size or crc32(content) != check:
            raise ValueError("damaged member " + path)
        return content

    # What the interpreter asks of a file system.

    def mount(self, readonly, mkfs):
        pass

    def umount(self):
        pass

    def stat(self, path):
        path = path.strip("/")
        if path in self._folders:
            return _DIRECTORY
        if path in self._members:
            return (0x8000,) + (0,) * 9
        raise OSError(2)

    def open(self, path, mode):
        path = path.strip("/")
        if path not in self._members or mode not in ("r", "rb"):
            raise OSError(2)
        return io.BytesIO(self.read(path))


def run(source, name):
    """Runs source as the main program."""
    exec(compile(source, name, "exec"), {"__name__": "__main__", "__file__": name})


def find_archive(source, longest_comment):
    """The archive at the end of an open file, or None."""
    end = source.seek(0, 2)
    for comment in (0, longest_comment):
        start = max(0, end - _END_SIZE - comment)
        source.seek(start)
        tail = source.read()
        at = tail.rfind(_END)
        if at >= 0 and len(tail) - at >= _END_SIZE:
            record = tail[at : at + _END_SIZE]
            if struct.unpack_from("<H", record, 20)[0] == len(tail) - at - _END_SIZE:
                return Archive(source, start + at, record)
    return None


def run_archive(archive, path):
    """Runs an archive's ``__main__.py``."""
    inside = path + "/.zip"  # no path of a file system begins with that of a file
    vfs.mount(archive, inside)
    sys.path.insert(0, inside)
    run(archive.read("__main__.py").decode(), inside + "/__main__.py")


def run_file(path):
    """Runs an archive, or a file of source."""
    source = open(path, "rb")
    archive = find_archive(source, _LONGEST_COMMENT)
    if archive:
        run_archive(archive, path)
        return
    source.seek(0)
    text = source.read().decode()
    source.close()
    sys.path.insert(0, path.rsplit("/", 1)[0])
    run(text, path)


def find_own_archive():
    """The archive behind the interpreter itself, or None."""
    try:
        return find_archive(open("/proc/self/exe", "rb"), 0)
    except OSError:  # no /proc
        return None


def main():
    gc.threshold(_COLLECT_AFTER)
    words = sys.argv
    own = find_own_archive()
    if own:
        words[0] = os.readlink("/proc/self/exe")
        run_archive(own, "/proc/self/exe")
        return
    words.pop(0)
    if words[:1] == ["-c"] and words[1:]:
        run(words.pop(1), "<string>")
    elif not words or words[0][:1] == "-":
        sys.stderr.write("usage: python [-X heapsize=BYTES[k|m]] FILE|-c CODE [ARGUMENT...]\n")
        sys.exit(2)
    else:
        run_file(words[0] if words[0][:1] == "/" else os.getcwd() + "/" + words[0])
