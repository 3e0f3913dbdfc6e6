"""The agent's configuration file in the guest: ``KEY=VALUE`` lines and ``#`` comments.

It is parsed as the agent parses it (``parse_pairs`` of its ``config``); a test compares
the two.  People edit it too, so values that are written here contain only characters
that need no quotes.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vmprovision.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PORT = 8080
_PORT_DIGITS = 5
_UNIX_ADDRESS = re.compile(r"unix:/[^:]{1,106}(:0?[0-7]{3})?$")
_VSOCK_ADDRESS = re.compile(r"vsock:(\d{1,10}:)?\d{1,10}$")
_PLAIN = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!()*+,;=%-]*$")
_VM_ID = re.compile(r"[A-Za-z0-9._~:@+-]{1,128}$")
_KEY = re.compile(rb"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)$")
_COMMENT = re.compile(rb"(?:^|[ \t])#.*", re.DOTALL)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parse_configuration(content: bytes) -> dict[str, str]:
    """Parse a configuration file; a later line overrides an earlier one."""
    lines = content.removeprefix(BYTE_ORDER_MARK).split(b"\n")
    return dict(setting for line in lines if (setting := _parse_line(line)))


def _parse_line(line: bytes) -> tuple[str, str] | None:
    """Return the key and the value of a line, or None."""
    key, equals, value = line.partition(b"=")
    match = _KEY.match(key.strip())
    if not equals or not match:
        return None
    value = value.strip()
    end = value.find(value[:1], 1) if value[:1] in (b"'", b'"') else -1
    value = value[1:end] if end > 0 else _COMMENT.sub(b"", value).rstrip()
    return match[1].decode("ascii"), value.decode(errors="replace")


def port_in(settings: Mapping[str, str]) -> int:
    """Return the agent's port in its settings, or the default port if the value is invalid."""
    value = settings.get("PORT", "")
    is_number = value.isascii() and value.isdecimal() and len(value) <= _PORT_DIGITS
    return int(value) if is_number and 0 < int(value) < 1 << 16 else DEFAULT_PORT


def update_configuration(content: bytes, changes: Mapping[str, str]) -> bytes:
    """Return the file with these settings changed or added, and all other lines unchanged."""
    left = dict(changes)
    current = parse_configuration(content)
    lines = []
    for line in re.findall(rb"[^\n]*\n|[^\n]+", content):
        key = (_parse_line(line.removeprefix(BYTE_ORDER_MARK)) or ("",))[0]
        if key in changes and changes[key] != current.get(key):
            if key in left:
                lines.append(f"{key}={left.pop(key)}\n".encode())
            continue
        left.pop(key, None)
        lines.append(line)
    if left and lines and not lines[-1].endswith(b"\n"):
        lines[-1] += b"\n"
    return b"".join(lines) + b"".join(f"{key}={value}\n".encode() for key, value in left.items())


def check_vm_id(value: str) -> str:
    """Return a VM id that fits into a URL's path and the configuration file.

    Raises:
        PlanError: the id is empty, too long, or has other characters.
    """
    if not _VM_ID.match(value) or value in (".", ".."):
        raise PlanError(
            f"the VM id {value!r} cannot be used",
            hint="use 1 to 128 letters, digits, and . _ ~ : @ + -",
        )
    return value


def check_manager_url(value: str) -> str:
    """Return the manager's base URL without a trailing slash.

    Raises:
        PlanError: it is not an http or https URL with a host, or carries a password,
            a query or characters that the configuration file cannot hold.
    """
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as exc:
        raise PlanError(f"the manager URL {value!r} is not valid: {exc}") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise PlanError(
            f"the manager URL {value!r} is not valid", hint="give it as http://HOST:PORT"
        )
    if parts.query or parts.fragment or "@" in parts.netloc or not _PLAIN.match(value):
        raise PlanError(
            f"the manager URL {value!r} has more than scheme, host, port and path",
            hint="put a secret into --token-file",
        )
    return value.rstrip("/")


def check_port(value: int) -> int:
    """Return a valid TCP port.

    Raises:
        PlanError: the port is out of range.
    """
    if not 0 < value < 1 << 16:
        raise PlanError(f"{value} is not a TCP port", hint="use 1 to 65535")
    return value


def check_listen(value: str) -> str:
    """Return the listen addresses: IP addresses, ``unix:PATH[:MODE]``, ``vsock:[CID:]PORT``.

    Raises:
        PlanError: an address has none of these forms.
    """
    addresses = [address.strip() for address in value.split(",")]
    for address in addresses:
        special = _UNIX_ADDRESS.match(address) or _VSOCK_ADDRESS.match(address)
        is_ip = _is_network(address.strip("[]"), prefix=False)
        if not _PLAIN.match(address) or not (special or is_ip):
            raise PlanError(
                f"the agent cannot listen on {address!r}",
                hint="give addresses, unix:/PATH or vsock:PORT, separated by commas",
            )
    return ",".join(addresses)


def check_allow(value: str) -> str:
    """Return the addresses and networks that may query the agent.

    Raises:
        PlanError: one of them is neither.
    """
    networks = [network.strip() for network in value.split(",")]
    for network in networks:
        if not _is_network(network, prefix=True):
            raise PlanError(
                f"{network!r} is neither an address nor a network",
                hint="give them as 192.0.2.1 or 2001:db8::/32, separated by commas",
            )
    return ",".join(networks)


def _is_network(value: str, *, prefix: bool) -> bool:
    address, slash, length = value.partition("/")
    try:
        version = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not slash:
        return True
    return prefix and length.isdecimal() and int(length) <= version.max_prefixlen


def check_token(value: str) -> str:
    """Return a bearer token of RFC 6750's alphabet.

    Raises:
        PlanError: the token is empty, too long, or has other characters.
    """
    if not re.match(r"[A-Za-z0-9._~+/-]{1,1024}=*$", value):
        raise PlanError(
            "the token is empty, or has characters that a bearer token cannot have",
            hint="use letters, digits and . _ ~ + / - (RFC 6750)",
        )
    return value
