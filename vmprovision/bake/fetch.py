"""Fetch a bake's source into a private file, and check that it is the right one.

A download resumes where an earlier one stopped (HTTP ranges, RFC 9110 section 14), and
is kept in the cache under its SHA-256. Every source is copied into the bake's private
folder, and the copy is hashed before anything opens it. So no other program can change
it in between.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from vmprovision import __version__
from vmprovision.bake.files import hash_file, writing
from vmprovision.bake.signature import check_signatures
from vmprovision.errors import SourceError
from vmprovision.host.cache import cache_directory, locked, make_private
from vmprovision.host.command import run
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from vmprovision.bake.loading import LoadedBakeFile
    from vmprovision.progress import Control

BLOCK = 1 << 20
COPY_SECONDS = 3600.0
SILENCE_SECONDS = 60.0  # seconds without data, after which a connection is closed
# Errors of a server or the network; any other OSError is from this host.
NETWORK_FAULTS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
ATTEMPTS = 5  # consecutive attempts without data
REDIRECTS_TO = "https"


def obtain_source(loaded: LoadedBakeFile, folder: Path, control: Control) -> Path:
    """Return a copy of the source image in a private folder; its content is not checked yet.

    Raises:
        SourceError: it cannot be read or downloaded.
        RecipeError: the recipe cannot be built.
        ImageError: the host has too little free space.
    """
    source = loaded.bake.source
    if source.recipe is not None:
        origin = build_image(
            source.recipe,
            control=control,
            recipes=loaded.beside(source.recipes) if source.recipes else None,
            tarball=loaded.beside(source.tarball) if source.tarball else None,
        )
    else:
        origin = _find_file(loaded, control)
    copy = folder / f"source{origin.suffix}"
    control.step("copying the source")
    with writing(copy):
        run(
            ["cp", "--reflink=auto", "--sparse=always", "--", origin, copy],
            timeout=COPY_SECONDS,
            cancelled=control.cancelled,
        )
        # an output is never more readable than the source
        copy.chmod(0o600 | copy.stat().st_mode & 0o044)
    return copy


def check_source(loaded: LoadedBakeFile, copy: Path, control: Control) -> str:
    """Return the copy's SHA-256, which matches the bake file's, if it states one.

    Raises:
        SourceError: the hash differs, or the signature that the bake file names is not
            valid.
    """
    control.step("checking the source")
    found = hash_file(copy, control)
    expected = loaded.bake.source.sha256
    if expected is not None and found != expected:
        raise SourceError(
            f"the source of {loaded.path} has another SHA-256 than it states: {found}",
            hint="get the right file, or, if you trust this one, put its SHA-256 into the bake "
            "file",
        )
    check_signatures(loaded, copy, found, control)
    return found


def _find_file(loaded: LoadedBakeFile, control: Control) -> Path:
    """Return the source's path on this host, after a download if needed."""
    source = loaded.bake.source
    path = loaded.beside(source.image) if source.image else None
    if path is not None and path.is_file():
        return path
    if source.url is None:
        raise SourceError(
            f"there is no file {path}",
            hint="image is relative to the bake file; add a url to have it downloaded",
        )
    parts = urlsplit(source.url)
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not path.is_file():
            raise SourceError(f"there is no file {source.url}", hint="write it as file:///PATH")
        return path
    return download(source.url, str(source.sha256), control)


def download(url: str, sha256: str, control: Control) -> Path:
    """Return the file of a URL from the cache, after a download if needed.

    Args:
        url: an https URL.
        sha256: the required hash; a cached file is hashed again.
        control: progress and cancelling.

    Raises:
        SourceError: it cannot be downloaded, or has another hash.
        ImageError: the host has too little free space.
    """
    folder = cache_directory() / "downloads" / sha256
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(unquote(urlsplit(url).path)).name).lstrip(".")
    target = folder / (name[-100:] or "image")
    partial = folder / "partial"
    with writing(target):
        make_private(folder)
        with locked(folder / "lock", lambda: control.step("waiting for another download")):
            if target.is_file() and hash_file(target, control) == sha256:
                return target
            target.unlink(missing_ok=True)
            had = partial.stat().st_size if partial.exists() else 0
            found = _download(url, partial, control)
            if found != sha256 and had:  # the partial file may be from another file
                partial.unlink()
                found = _download(url, partial, control)
            if found != sha256:
                shutil.rmtree(folder, ignore_errors=True)
                raise SourceError(
                    f"{url} has another SHA-256 than the bake file states: {found}",
                    hint="correct the url, or, if you trust this file, its SHA-256",
                )
            partial.replace(target)
    return target


def _download(url: str, partial: Path, control: Control) -> str:
    """Download the missing rest, and return the SHA-256 of the whole file."""
    name = Path(urlsplit(url).path).name
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _receive(url, partial, control, f"downloading {name}")
            return hash_file(partial, control)
        except urllib.error.HTTPError as exc:
            if exc.code < 500 and exc.code not in (408, 429):  # noqa: PLR2004 -- RFC 9110
                raise SourceError(f"{url} cannot be downloaded: {exc}") from exc
            reason: object = exc
        except NETWORK_FAULTS as exc:
            reason = getattr(exc, "reason", exc)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise SourceError(
                    f"{url} cannot be downloaded: {reason.verify_message}",
                    hint="set SSL_CERT_FILE to the file with the trusted certificates",
                ) from exc
        after = partial.stat().st_size if partial.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures == ATTEMPTS:
            raise SourceError(
                f"{url} cannot be downloaded: {reason}",
                hint="run the same command again: it resumes the download",
            )
        control.step(f"downloading {name}: connection lost, trying again")
        control.cancelled.wait(2.0**failures / 2)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follow redirections to other https URLs only."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        *rest: Any,  # noqa: ANN401 -- as urllib calls it; the new URL is the last
    ) -> urllib.request.Request | None:
        """Return the request for the new URL."""
        if urlsplit(rest[-1]).scheme != REDIRECTS_TO:
            raise SourceError(f"{req.full_url} redirects to {rest[-1]}, which is not an https URL")
        return super().redirect_request(req, *rest)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for https URLs only, through the host's proxy if it has one."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _OnlyHttps(),
    ):
        opener.add_handler(handler)
    return opener


def _receive(url: str, partial: Path, control: Control, step: str) -> None:
    """Append the server's bytes from the file's end on; start again if it cannot resume."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(  # noqa: S310 -- the opener knows https only
        url,
        headers={"User-Agent": f"vmprovision/{__version__}", "Accept-Encoding": "identity"}
        | ({"Range": f"bytes={have}-"} if have else {}),
    )
    try:
        response = _opener().open(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as exc:
        if exc.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            size = re.fullmatch(r"bytes \*/(\d+)", exc.headers.get("Content-Range") or "")
            if size and int(size[1]) == have:
                return  # the file is complete
            partial.unlink()
            raise ConnectionError("the server has a shorter file") from exc
        raise
    with contextlib.closing(response):
        going_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if going_on and not re.match(rf"bytes {have}-", response.headers.get("Content-Range", "")):
            raise ConnectionError("the server sent another part than requested")
        have = have if going_on else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        with partial.open("ab" if going_on else "wb") as file:
            _copy(response, file, have, total, control, step)


def _copy(  # noqa: PLR0913, PLR0917 -- what a loop needs
    response: http.client.HTTPResponse,
    file: IO[bytes],
    have: int,
    total: int | None,
    control: Control,
    step: str,
) -> None:
    while block := response.read(BLOCK):
        file.write(block)
        have += len(block)
        control.step(step, have / total if total else None)
    file.flush()
    os.fsync(file.fileno())
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)
