"""Read files without trusting their size or their kind."""

import os

from . import compat

READ_LIMIT = 65536
LINE_LIMIT = 1024
LINES_LIMIT = 262144


def open_to_read(path):
    """Return a descriptor of a file; neither opening nor reading it blocks, whatever it is.

    A FIFO without a writer is empty. Raises OSError.
    """
    return os.open(compat.to_path(path), os.O_NONBLOCK)


def read_bounded(path, limit=READ_LIMIT):
    """Return the content of a file as bytes, up to the limit; b"" if it cannot be read."""
    pieces = []
    try:
        source = open_to_read(path)
        try:
            while limit > 0:
                piece = os.read(source, min(limit, compat.READ_SIZE))
                if not piece:
                    break
                pieces.append(piece)
                limit -= len(piece)
        finally:
            os.close(source)
    except OSError:
        pass
    return b"".join(pieces)


def read_text(path, limit=READ_LIMIT):
    """Return the content of a file as text without surrounding space; None if there is none."""
    return compat.to_text(read_bounded(path, limit)).strip() or None


def read_pieces(path, limit, size):
    """Yield a file's content as bytes, up to the limit; nothing if it cannot be read."""
    try:
        # MicroPython closes abandoned file objects, but not abandoned generators.
        source = compat.as_file(open_to_read(path))
        try:
            while limit > 0:
                piece = source.read(size)
                if not piece:
                    break
                yield piece
                limit -= len(piece)
        finally:
            source.close()
    except compat.FILE_ERRORS:
        pass


def read_lines(path, limit=LINES_LIMIT):
    """Yield the lines of a file as bytes, with little of it in memory at a time.

    Long lines, such as the interrupts in /proc/stat, are cut. Only lines that begin
    within the limit are read. Yield nothing if the file cannot be read.
    """
    rest = b""
    for piece in read_pieces(path, limit, LINE_LIMIT):
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()[:LINE_LIMIT]
        limit -= len(piece)
        for line in lines:
            yield line[:LINE_LIMIT]
    if rest and limit > 0:  # else it may be an incomplete line
        yield rest
