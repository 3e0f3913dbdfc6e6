"""Decide who may do what: tokens of clients and of VMs, and the folders of images."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmprovision.errors import ImageNotFoundError, PlanError
from vmprovision.guest.configuration import check_token

if TYPE_CHECKING:
    from collections.abc import Iterable

Role = Literal["admin", "read"]
TOKEN_BYTES = 32
FILE_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of a token file, as their hashes."""

    admin: frozenset[str] = field(repr=False)
    read: frozenset[str] = field(repr=False)

    def role_of(self, token: str) -> Role | None:
        """Return the role of a token's holder; compare all hashes, so that the time is constant."""
        shown = hash_token(token)
        found: Role | None = None
        for role, hashes in (("read", self.read), ("admin", self.admin)):
            for known in hashes:
                if hmac.compare_digest(shown, known):
                    found = role  # type: ignore[assignment] # one of both words
        return found


def load_tokens(path: Path) -> Tokens:
    """Return the tokens of a file: lines ``admin TOKEN`` or ``read TOKEN``, and ``#`` comments.

    Raises:
        PlanError: it cannot be read, others can read it, or a line is invalid.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise PlanError(f"others can read the token file {path}", hint=f"chmod 0600 {path}")
        with path.open("rb") as file:
            lines = file.read(FILE_LIMIT).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise PlanError(f"the token file {path} cannot be read: {exc}") from exc
    found: dict[str, set[str]] = {"admin": set(), "read": set()}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in found:  # noqa: PLR2004 -- role and token
            raise PlanError(
                f"line {number} of the token file {path} is neither 'admin TOKEN' nor 'read TOKEN'"
            )
        found[words[0]].add(hash_token(check_token(words[1])))
    if not found["admin"]:
        raise PlanError(f"the token file {path} has no line 'admin TOKEN'")
    return Tokens(admin=frozenset(found["admin"]), read=frozenset(found["read"]))


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token; tokens are long and random, so no salt is needed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    """Return a token for the agent of a VM."""
    return secrets.token_hex(TOKEN_BYTES)


def is_token(shown: str, known_hash: str) -> bool:
    """Return whether a token has this hash, in constant time."""
    return hmac.compare_digest(hash_token(shown), known_hash)


def shown_token(authorization: Iterable[str]) -> str:
    """Return the token of a request's Authorization fields (RFC 6750), or an empty string."""
    fields = list(authorization)
    if len(fields) != 1:
        return ""
    scheme, _, rest = fields[0].partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else ""


def permitted_image(path: str, folders: Iterable[Path]) -> Path:
    """Return the real path of an image that a request names.

    A path outside the folders gets the same error whether or not it exists, so that clients
    cannot probe this host's files.

    Raises:
        ImageNotFoundError: it is not a file below one of the folders.
    """
    allowed = [folder.resolve() for folder in folders]
    named = ", ".join(str(folder) for folder in allowed) or "none"
    refused = ImageNotFoundError(
        f"{path[:300]}: there is no such image below the server's image folders ({named})",
        hint="put the image there, or start the server with --images FOLDER",
    )
    if not path.startswith("/") or "\0" in path:
        raise refused
    try:
        real = Path(path).resolve(strict=True)
        is_inside = any(real.is_relative_to(folder) for folder in allowed)
        if not is_inside or not real.is_file():
            raise refused
    except (OSError, RuntimeError, ValueError) as exc:  # a circle of links, a name too long
        raise refused from exc
    return real
