"""Sigstore bundles of a source, made by an instance of our own and checked without a network."""

from __future__ import annotations

import hashlib
import importlib.util
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.bake import load_bake_file
from vmprovision.bake.fetch import check_source
from vmprovision.errors import SourceError
from vmprovision.progress import Control

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY = "https://github.com/example/images/.github/workflows/release.yml@refs/tags/v1"
ISSUER = "https://token.actions.githubusercontent.com"
IMAGE = b"image"
BAKE_FILE = """\
[source]
image = "guest.raw"
sha256 = "{sha256}"
bundle = "{bundle}"
trusted_root = "{root}"
identity = "{identity}"
issuer = "{issuer}"
[[output]]
format = "raw"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image, bundles for it by two instances, and their roots."""
    require(importlib.util.find_spec("sigstore"), "the extra sigstore is not installed")
    from tests.bake.sigstore_instance import Instance  # noqa: PLC0415 -- of the extra's libraries

    made = tmp_path_factory.mktemp("sigstore")
    (made / "guest.raw").write_bytes(IMAGE)
    for name in ("ours", "theirs"):
        instance = Instance()
        (made / f"{name}.root.json").write_text(instance.trusted_root())
        (made / f"{name}.json").write_text(instance.sign(IMAGE, IDENTITY, ISSUER))
        (made / f"{name}.other.json").write_text(instance.sign(b"another", IDENTITY, ISSUER))
    return made


def check(
    folder: Path, bundle: str, root: str = "ours.root.json", identity: str = IDENTITY
) -> None:
    """Check the image of the folder as a bake does."""
    file = folder / "a.toml"
    sha256 = hashlib.sha256(IMAGE).hexdigest()
    file.write_text(
        BAKE_FILE.format(sha256=sha256, bundle=bundle, root=root, identity=identity, issuer=ISSUER)
    )
    assert check_source(load_bake_file(file), folder / "guest.raw", Control()) == sha256


def test_a_good_bundle_is_accepted(folder: Path) -> None:
    """The identity's signature, in the logs of the instance that is trusted."""
    check(folder, "ours.json")
    check(folder, "theirs.json", "theirs.root.json")


@pytest.mark.parametrize(
    ("bundle", "root", "identity", "reason"),
    [
        ("theirs.json", "ours.root.json", IDENTITY, "chain"),
        ("ours.other.json", "ours.root.json", IDENTITY, "digest"),
        ("ours.json", "ours.root.json", IDENTITY + "0", "SAN"),
        ("guest.raw", "ours.root.json", IDENTITY, ""),
        ("ours.json", "guest.raw", IDENTITY, ""),
    ],
)
def test_anything_else_is_refused(
    folder: Path, bundle: str, root: str, identity: str, reason: str
) -> None:
    """Another instance's, another image's, another identity's, and what is no bundle."""
    with pytest.raises(SourceError, match=f"is no proof that .* has signed the source: .*{reason}"):
        check(folder, bundle, root, identity)


@pytest.mark.parametrize("part", ["signedEntryTimestamp", "rootHash", "signature"])
def test_a_changed_bundle_is_refused(folder: Path, part: str) -> None:
    """Neither log's promise or proof, nor the signature, can be replaced by those of another."""
    good, other = ((folder / f"ours{name}.json").read_text() for name in ("", ".other"))
    mark = f'"{part}": "'
    old, new = (text.partition(mark)[2].partition('"')[0] for text in (good, other))
    assert old != new
    (folder / "changed.json").write_text(good.replace(mark + old, mark + new))
    with pytest.raises(SourceError, match="is no proof"):
        check(folder, "changed.json")


def test_a_missing_file_is_named(folder: Path) -> None:
    """Both files are beside the bake file."""
    with pytest.raises(SourceError, match=r"there is no file .*nothing\.json"):
        check(folder, "nothing.json")
