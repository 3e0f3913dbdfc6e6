"""Write JSON (RFC 8259), because python3-minimal has no json module.

The output is pure ASCII. Integers never have a fraction and floats always have one,
because the wire contract distinguishes the two.
"""

from . import compat

_SHORT = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}


class Written(object):
    """A value that is JSON text already."""

    def __init__(self, text):
        self.text = text


def dumps(value):  # noqa: PLR0911 -- one return for each kind
    """Return JSON of None, booleans, numbers, text, UTF-8 bytes, lists, tuples, dicts, Written.

    Dict keys are written in sorted order. Floats are written with at most
    three decimals; infinities and NaN, which JSON lacks, become null.
    """
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, compat.INTEGERS):
        return "%d" % value
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, dict):
        pairs = [_text(key) + ":" + dumps(value[key]) for key in sorted(value)]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([dumps(item) for item in value]) + "]"
    return value.text if isinstance(value, Written) else _text(value)


def _float(value):
    if abs(value) >= 1e15:
        return "null" if value in (float("inf"), float("-inf")) else repr(value)
    text = ("%.3f" % value).rstrip("0")
    if text == "nan":
        return "null"
    return text + "0" if text.endswith(".") else text


def _text(value):
    out = []
    for code in compat.code_points(value):
        if code in _SHORT:
            out.append(_SHORT[code])
        elif 32 <= code < 127:
            out.append(chr(code))
        elif code < 0x10000:
            out.append("\\u%04x" % code)
        else:
            pair = code - 0x10000
            out.append("\\u%04x\\u%04x" % (0xD800 | pair >> 10, 0xDC00 | pair & 0x3FF))
    return '"' + "".join(out) + '"'
