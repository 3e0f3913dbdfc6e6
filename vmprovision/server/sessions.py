"""Browser sessions: a cookie that proves a login without containing the token.

A session is signed with the hash of the token that was used to log in. So every server
with the same token file accepts it, a restart does not end it, and removing a token
from the file ends its sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING

from vmprovision.server.access import hash_token

if TYPE_CHECKING:
    from vmprovision.server.access import Role, Tokens

SECONDS = 12 * 3600
_FORM = re.compile(r"(?P<said>(?P<end>[0-9]{1,12})\.[0-9a-f]{32})\.(?P<mark>[0-9a-f]{64})")


def cookie_name(scheme: str) -> str:
    """Return the cookie's name; over TLS, one that no other host of the domain can set."""
    return "__Host-vmprovision" if scheme == "https" else "vmprovision"


def make_session(tokens: Tokens, token: str, now: float) -> str | None:
    """Return a session for a token's holder, or None if the token is unknown."""
    if tokens.role_of(token) is None:
        return None
    said = f"{int(now) + SECONDS}.{secrets.token_hex(16)}"
    return f"{said}.{_sign(hash_token(token), f'session {said}')}"


def role_of_session(tokens: Tokens, session: str, now: float) -> Role | None:
    """Return the role of a session's holder, or None if the session is forged or has ended."""
    parts = _FORM.fullmatch(session)
    if parts is None or int(parts["end"]) < now:
        return None
    found: Role | None = None
    hashes: tuple[tuple[Role, frozenset[str]], ...]
    hashes = (("read", tokens.read), ("admin", tokens.admin))
    for role, known in hashes:
        for key in known:
            if hmac.compare_digest(_sign(key, f"session {parts['said']}"), parts["mark"]):
                found = role
    return found


def form_token(installation: str, session: str) -> str:
    """Return the hidden token of this server's forms, which no other site can know.

    Args:
        installation: the store's name, which all its servers know.
        session: the browser's session; empty without login.
    """
    return _sign(hash_token(installation), f"form {session}")


def is_form_token(shown: str, installation: str, session: str) -> bool:
    """Return whether a form is from this server and for this session."""
    return hmac.compare_digest(hash_token(shown), hash_token(form_token(installation, session)))


def _sign(key: str, said: str) -> str:
    return hmac.new(key.encode(), said.encode(), hashlib.sha256).hexdigest()
