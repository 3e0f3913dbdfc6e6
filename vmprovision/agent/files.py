"""Reads files without trusting their size."""

from . import compat

READ_LIMIT = 65536


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
