"""Reads files without trusting their size."""

from . import compat

READ_LIMIT = 65536
LINE_LIMIT = 1024
LINES_LIMIT = 262144


def read_bounded(path, limit=READ_LIMIT):
    """The content of a file as bytes, up to the limit; b"" if it cannot be read."""
    pieces = []
    try:
        source = open(path, "rb")
        try:
            while limit > 0:
                piece = source.read(min(limit, compat.READ_SIZE))
                if not piece:
                    break
                pieces.append(piece)
                limit -= len(piece)
        finally:
            source.close()
    except compat.FILE_ERRORS:
        pass
    return b"".join(pieces)


def read_text(path, limit=READ_LIMIT):
    """The content of a file as text without space around it; None if there is none."""
    return compat.to_text(read_bounded(path, limit)).strip() or None


def read_lines(path, limit=LINES_LIMIT):
    """Yields the lines of a file as bytes, with little of it in memory at a time.

    Of long lines, such as the interrupts' in /proc/stat, the beginning only, and what begins
    within the limit; nothing if it cannot be read.
    """
    rest = b""
    try:
        source = open(path, "rb")
        try:
            while limit > 0:
                piece = source.read(LINE_LIMIT)
                if not piece:
                    if rest:
                        yield rest
                    break
                limit -= len(piece)
                lines = (rest + piece).split(b"\n")
                rest = lines.pop()[:LINE_LIMIT]
                for line in lines:
                    yield line[:LINE_LIMIT]
        finally:
            source.close()
    except compat.FILE_ERRORS:
        pass
