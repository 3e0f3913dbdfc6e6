"""Decide who may ask, by the peer's address and by the bearer token of the request."""

from . import addresses, compat

_MAPPED = b"\0" * 10 + b"\xff\xff"  # before an IPv4 address on an IPv6 socket (RFC 4291)


def parse_allow(value):
    """Return the networks in a list of addresses and CIDRs, as (packed address, prefix length).

    Raises ValueError.
    """
    networks = []
    for word in value.replace(",", " ").split():
        address, slash, length = word.partition("/")
        packed = compat.pack_address(address)
        if packed is None or (slash and (not compat.is_digits(length) or len(length) > 3)):
            raise ValueError("has something that is neither an address nor a network")
        bits = int(length) if slash else len(packed) * 8
        if bits > len(packed) * 8:
            raise ValueError("has a prefix that is too long")
        if packed.startswith(_MAPPED) and bits >= 96:
            packed, bits = packed[12:], bits - 96
        networks.append((packed, bits))
    return networks


def is_in(network, packed):
    """Return whether a packed address is in a network, in the form that ``parse_allow`` returns."""
    base, bits = network
    whole, rest = divmod(bits, 8)
    if len(base) != len(packed) or base[:whole] != packed[:whole]:
        return False
    return not rest or (bytearray(base)[whole] ^ bytearray(packed)[whole]) >> (8 - rest) == 0


_SELF = parse_allow("127.0.0.0/8 ::1")


def is_allowed(allow, packed):
    """Return whether a peer may connect; the guest itself and peers without an IP address may."""
    if allow is None or packed is None:
        return True
    if packed.startswith(_MAPPED):
        packed = packed[12:]
    if [network for network in _SELF + allow if is_in(network, packed)]:
        return True
    # No other machine can connect from one of this guest's addresses: the answer would stay here.
    return addresses.is_own(packed)


def shows(values, token):
    """Return whether a request has exactly one Authorization field, with this token (RFC 6750)."""
    if not token or len(values) != 1 or values[0][:7].lower() != b"bearer ":
        return False
    shown = bytearray(values[0][7:].strip())
    wanted = bytearray(compat.to_bytes(token))
    # Constant time: a wrong token takes as long as the right one.
    difference = len(shown) ^ len(wanted)
    for place, byte in enumerate(shown):
        difference |= byte ^ wanted[place % len(wanted)]
    return difference == 0
