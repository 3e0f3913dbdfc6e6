"""OpenPGP signatures of a source, made by gpg itself."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.bake import load_bake_file
from vmprovision.bake.fetch import check_source
from vmprovision.errors import SourceError
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BAKE_FILE = """\
[source]
image = "guest.raw"
sha256 = "{sha256}"
signature = "{signature}"
keyring = "{keyring}"
[[output]]
format = "raw"
"""


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an image, signatures of it by two keys, and a keyring with each key."""
    for program in ("gpg", "gpgv", "gpgconf"):
        require(shutil.which(program), f"{program} is not installed")
    folder = tmp_path_factory.mktemp("signed")
    home = tmp_path_factory.mktemp("gpg")  # its sockets need a short path
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    (folder / "guest.raw").write_bytes(b"image")
    try:
        for name in ("vendor", "stranger"):
            address = f"{name}@example.org"
            make = ["--quick-generate-key", address, "ed25519", "sign", "never"]
            subprocess.run([*gpg, *make], check=True, capture_output=True)
            exported = subprocess.run([*gpg, "--export", address], check=True, capture_output=True)
            (folder / f"{name}.gpg").write_bytes(exported.stdout)
            sign = ["--local-user", address, "--armor", "--detach-sign", "--output"]
            subprocess.run(
                [*gpg, *sign, folder / f"{name}.asc", folder / "guest.raw"],
                check=True,
                capture_output=True,
            )
        yield folder
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)


def check(folder: Path, signature: str, keyring: str) -> None:
    """Check the image of the folder as a bake does."""
    file = folder / "a.toml"
    image = folder / "guest.raw"
    sha256 = hashlib.sha256(image.read_bytes()).hexdigest()
    file.write_text(BAKE_FILE.format(sha256=sha256, signature=signature, keyring=keyring))
    assert check_source(load_bake_file(file), image, Control()) == sha256


def test_a_good_signature_is_accepted(signed: Path) -> None:
    """The vendor's signature, checked with the vendor's key."""
    check(signed, "vendor.asc", "vendor.gpg")


@pytest.mark.parametrize(
    ("signature", "keyring"),
    [
        ("stranger.asc", "vendor.gpg"),
        ("guest.raw", "vendor.gpg"),
        ("vendor.asc", "guest.raw"),
        ("missing", "vendor.gpg"),
        ("vendor.asc", "missing"),
    ],
)
def test_anything_else_is_refused(signed: Path, signature: str, keyring: str) -> None:
    """Another key's signature, no signature, no keyring."""
    with pytest.raises(SourceError, match=r"is not a signature of the source|there is no file"):
        check(signed, signature, keyring)


def test_a_signature_of_another_image_is_refused(signed: Path) -> None:
    """The SHA-256 fits the image, but the vendor has signed another one."""
    image = signed / "guest.raw"
    try:
        image.write_bytes(b"another")
        with pytest.raises(SourceError, match="BAD signature"):
            check(signed, "vendor.asc", "vendor.gpg")
    finally:
        image.write_bytes(b"image")
