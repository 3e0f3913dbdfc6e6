"""Check who has signed a source: by OpenPGP with gpgv(1), or by Sigstore with its library.

Nothing here asks the network. Whom to trust is in files beside the bake file: a keyring,
or a Sigstore instance's trusted root.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError, SourceError
from vmprovision.host.command import run

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.bake.loading import LoadedBakeFile
    from vmprovision.progress import Control

GPGV_SECONDS = 3600.0
BUNDLE_LIMIT = 4 << 20  # bytes; a bundle has some thousands


def check_signatures(loaded: LoadedBakeFile, copy: Path, sha256: str, control: Control) -> None:
    """Check the signatures that the bake file names.

    Args:
        loaded: the bake file.
        copy: the source, which no other program can change.
        sha256: the copy's hash.
        control: progress and cancelling.

    Raises:
        SourceError: a signature is not valid, or cannot be checked here.
    """
    source = loaded.bake.source
    if source.signature and source.keyring:
        control.step("checking the signature")
        signature, keyring = loaded.beside(source.signature), loaded.beside(source.keyring)
        _require_files(signature, keyring)
        _check_openpgp(copy, signature, keyring)
    if source.bundle and source.trusted_root:
        control.step("checking the Sigstore bundle")
        bundle, root = loaded.beside(source.bundle), loaded.beside(source.trusted_root)
        _require_files(bundle, root)
        _check_sigstore(sha256, bundle, root, identity=source.identity, issuer=source.issuer)


def _require_files(*paths: Path) -> None:
    for path in paths:
        if not path.is_file():
            raise SourceError(
                f"there is no file {path}",
                hint="the files of a signature are relative to the bake file",
            )


def _check_openpgp(copy: Path, signature: Path, keyring: Path) -> None:
    """Refuse a file that no key of the keyring has signed.

    Raises:
        SourceError: no key has signed it, or gpgv is not installed.
    """
    try:
        run(
            ["gpgv", "--weak-digest", "SHA1", "--keyring", keyring, "--", signature, copy],
            timeout=GPGV_SECONDS,
        )
    except CommandError as exc:
        reason = exc.stderr.strip().splitlines()[-1:] or [exc.message]
        raise SourceError(
            f"{signature} is not a signature of the source by a key of {keyring}: {reason[0]}",
            hint="get image and signature again; gpgv is in the package gpgv",
        ) from exc


def _check_sigstore(
    sha256: str, bundle: Path, root: Path, *, identity: str | None, issuer: str | None
) -> None:
    """Refuse a file whose hash this identity has not signed, as a Sigstore instance witnesses.

    The library checks the certificate with its timestamp of the certificate log, the entry in
    the transparency log, and the signature.

    Raises:
        SourceError: any of it is not valid, or the library is not installed.
    """
    try:
        models, verify, errors, hashes = (
            importlib.import_module(f"sigstore.{name}")
            for name in ("models", "verify", "errors", "hashes")
        )
    except ModuleNotFoundError as exc:
        raise SourceError(
            f"a Sigstore bundle needs the Python package {exc.name}, which is not installed",
            hint="pip install 'vmprovision[sigstore]'",
        ) from exc
    algorithm = hashes.HashAlgorithm.SHA2_256
    try:
        with bundle.open("rb") as file:
            signed = models.Bundle.from_json(file.read(BUNDLE_LIMIT))
        verifier = verify.Verifier(trusted_root=models.TrustedRoot.from_file(str(root)))
        verifier.verify_artifact(
            hashes.Hashed(algorithm=algorithm, digest=bytes.fromhex(sha256)),
            signed,
            verify.policy.Identity(identity=identity, issuer=issuer),
        )
    except (errors.Error, ValueError, OSError) as exc:
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise SourceError(
            f"{bundle} is no proof that {identity} has signed the source: {reason}",
            hint="get image and bundle again, and compare identity and issuer with the vendor's",
        ) from exc
