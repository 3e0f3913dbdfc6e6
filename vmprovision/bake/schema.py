"""The model that checks a bake file, and its JSON schema for editors.

A bake file is TOML with the tables ``[source]``, ``[agent]``, ``[prove]`` and one
``[[output]]`` for each image to write. docs/bake.md explains every key.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vmprovision.errors import PlanError
from vmprovision.guest.configuration import (
    check_allow,
    check_listen,
    check_manager_url,
    check_port,
)
from vmprovision.guest.facts import InitSystem  # noqa: TC001 -- pydantic evaluates it

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
OutputFormat = Literal["qcow2", "raw", "vmdk", "vhdx", "oci"]
COMPRESSIBLE = ("qcow2", "vmdk", "oci")
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$"
# Files that are always written, so no image may have one of these names.
RESERVED = ("SHA256SUMS", "bake.json", "sbom.cdx.json", "provenance.json", "junit.xml")
LONGEST_PROOF = 24 * 3600.0
# Keys of [source] that belong together.
SIGNATURE = ("signature", "keyring")
BUNDLE = ("bundle", "trusted_root", "identity", "issuer")


def _fault(message: str) -> PydanticCustomError:
    """Return an error whose message is shown unchanged."""
    return PydanticCustomError("bake", "{message}", {"message": message})


def _checked(check: Any) -> AfterValidator:  # noqa: ANN401 -- a function of one option's value
    """Return a validator that applies a check of ``inject``'s options."""

    def refuse(value: Any) -> Any:  # noqa: ANN401 -- as pydantic calls it
        try:
            check(value)
        except PlanError as exc:
            raise _fault(exc.message) from exc
        return value

    return AfterValidator(refuse)


def _https(value: str) -> str:
    """Return the URL if it can be fetched."""
    parts = urlsplit(value)
    if parts.scheme not in ("https", "file") or not (parts.hostname or parts.scheme == "file"):
        raise _fault(f"must be an https:// or file:// URL, not {value!r}")
    if parts.username or parts.password:
        raise _fault("must not contain a password, because a bake file is in a repository")
    return value


class _Table(BaseModel):
    """A table of a bake file: unknown keys are refused, and no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Table):
    """The image that the agent is put into."""

    image: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The image file, relative to the bake file."
    )
    url: Annotated[str, AfterValidator(_https)] | None = Field(
        default=None,
        description="Where the image is downloaded from (https:// or file://), if `image` is not "
        "there.",
    )
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        default=None, description="The SHA-256 of the image file; always needed, but for a recipe."
    )
    format: Literal["raw", "qcow2", "vmdk", "vdi", "vhdx"] | None = Field(
        default=None, description="The disk format, if the file's name does not say it."
    )
    root: Annotated[str, Field(pattern="^/dev/")] | None = Field(
        default=None, description="The device of the root filesystem, if there are several."
    )
    signature: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A file with a detached OpenPGP signature of the image, relative to the bake "
        "file.",
    )
    keyring: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A file with the public keys that may have signed it, as `gpg --export` "
        "writes it.",
    )
    bundle: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A file with a Sigstore bundle that signs the image, relative to the bake "
        "file.",
    )
    trusted_root: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="A file with the trusted root of the Sigstore instance."
    )
    identity: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Who must have signed it: a URI or an e-mail address."
    )
    issuer: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The URL of the service that vouches for the identity."
    )
    recipe: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Build the image from this recipe (`vmprovision image list`)."
    )
    recipes: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="A folder with recipes of your own, relative to the bake file."
    )
    tarball: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The root filesystem that the recipe names, or its folder."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        """Refuse a source that is not exactly one image."""
        of_image = ("image", "url", "sha256", "format", *SIGNATURE, *BUNDLE)
        if self.recipe is not None:
            given = [name for name in of_image if getattr(self, name) is not None]
            if given:
                raise _fault(f"a recipe is built here and has no {' or '.join(given)}")
            return self
        if self.image is None and self.url is None:
            raise _fault("needs an image, a url or a recipe")
        if self.sha256 is None:
            raise _fault("needs sha256, the SHA-256 of the image file (`sha256sum FILE` prints it)")
        for names in (SIGNATURE, BUNDLE):
            missing = [name for name in names if getattr(self, name) is None]
            if 0 < len(missing) < len(names):
                together = f"{', '.join(names[:-1])} and {names[-1]}"
                raise _fault(f"{together} belong together; missing: {', '.join(missing)}")
        if self.recipes is not None or self.tarball is not None:
            raise _fault("recipes and tarball belong to a recipe, and there is none")
        return self


class Agent(_Table):
    """The options of ``vmprovision inject``; a golden image has no VM id."""

    manager_url: Annotated[str, _checked(check_manager_url)] | None = Field(
        default=None, description="Where the agent reports its address: http://HOST:PORT."
    )
    port: Annotated[int, _checked(check_port)] | None = Field(
        default=None, description="The TCP port that the agent listens on; 8080 if left out."
    )
    token_file: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A file with the token that the agent shows to the manager, relative to the "
        "bake file.",
    )
    read_token_file: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="A file with the token that the agent demands of its readers."
    )
    listen: Annotated[str, _checked(check_listen)] | None = Field(
        default=None, description="Where the agent listens: addresses, unix:/PATH, vsock:PORT."
    )
    allow: Annotated[str, _checked(check_allow)] | None = Field(
        default=None, description="The addresses and networks that may ask the agent."
    )
    allow_configure: bool | None = Field(
        default=None, description="Whether the guest's network may be changed through the agent."
    )
    init: InitSystem | None = Field(
        default=None, description="The init system, if you know better than the evidence."
    )
    runtime: Annotated[str, Field(min_length=1)] = Field(
        default="auto",
        description="What runs the agent: auto, guest, bundled, or the path of an interpreter.",
    )


class Prove(_Table):
    """Boot a throwaway copy of the image and check its agent."""

    timeout: Annotated[float, Field(gt=0, le=LONGEST_PROOF)] = Field(
        default=300.0, description="Seconds for the boot and all checks."
    )
    kernel: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="A kernel for an image that has neither boot loader nor kernel."
    )
    initrd: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The initrd that belongs to the kernel."
    )


class Output(_Table):
    """One image to write."""

    format: OutputFormat = Field(
        description="The disk format; oci is a KubeVirt containerDisk as an OCI image layout."
    )
    compress: bool = Field(default=False, description="Compress it: qcow2, vmdk and oci.")
    name: Annotated[str, Field(pattern=FILE_NAME)] | None = Field(
        default=None,
        description="The file's name; the bake file's with the format's suffix if left out.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Output:
        """Refuse an output that cannot be written."""
        if self.compress and self.format not in COMPRESSIBLE:
            raise _fault(f"{self.format} has no compression: leave out compress")
        if self.name in RESERVED:
            raise _fault(f"the name {self.name} is reserved for a file that bake itself writes")
        return self

    def file_name(self, stem: str) -> str:
        """Return the name of the file, or of the folder of an OCI layout.

        Args:
            stem: the bake file's name without its suffix.
        """
        return self.name or f"{stem}.{self.format}"


class BakeFile(_Table):
    """One golden image: its source, its agent, its proof and its outputs."""

    source: Source = Field(description="The image that the agent is put into.")
    agent: Agent = Field(default_factory=Agent, description="The settings of the agent.")
    prove: Prove | None = Field(
        default=None, description="Boot a throwaway copy of the image and check its agent."
    )
    output: Annotated[list[Output], Field(min_length=1)] = Field(
        description="The images to write, all with the same content."
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of bake files, as in docs/bake.schema.json."""
    schema = BakeFile.model_json_schema()
    return {"$schema": SCHEMA_ID, **schema, "title": "vmprovision bake file"}


def schema_text() -> str:
    """Return the JSON schema as a file."""
    return json.dumps(json_schema(), indent=2) + "\n"
