"""Write the finished image in the formats that the bake file names.

Every output is compared with the image that was verified and proven, so the proof holds
for all. ``oci`` is an OCI image layout (image-spec 1.1). Its only layer has one disk as
KubeVirt's containerDisk requires: in ``/disk``, readable by QEMU's user 107.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from typing import TYPE_CHECKING, Any

from vmprovision.bake.files import hash_file, writing
from vmprovision.errors import ImageError
from vmprovision.image.chain import run_qemu_img, source
from vmprovision.image.disk import open_image

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.bake.schema import Output
    from vmprovision.image.disk import OpenImage
    from vmprovision.progress import Control

CONVERT_SECONDS = 7200.0
QEMU_USER = 107  # QEMU's user in KubeVirt
# this project's names -> Go's
OCI_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i386": "386",
}
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
INDEX = "application/vnd.oci.image.index.v1+json"


def write_output(  # noqa: PLR0913 -- what an output depends on
    image: Path,
    disk_format: str | None,
    output: Output,
    target: Path,
    *,
    architecture: str,
    control: Control,
) -> None:
    """Write one output of a finished image, and compare it with the image.

    Args:
        image: the finished image.
        disk_format: its format, if its name does not state it.
        output: the output's table in the bake file.
        target: the file to write, or the folder of an OCI layout.
        architecture: the guest's architecture.
        control: progress and cancelling.

    Raises:
        ImageError: it cannot be written, or differs from the image.
        CommandError: qemu-img failed.
    """
    with (
        writing(target),
        open_image(image, stated_format=disk_format, write=False, control=control) as opened,
    ):
        if output.format == "oci":
            disk = target.with_name(f"{target.name}.disk")
            _convert(opened, "qcow2", disk, compress=output.compress, control=control)
            _write_oci(disk, target, f"{target.stem}.qcow2", architecture)
            disk.unlink()
        else:
            _convert(opened, output.format, target, compress=output.compress, control=control)


def _convert(
    opened: OpenImage, disk_format: str, target: Path, *, compress: bool, control: Control
) -> None:
    options = {
        "vmdk": ["-o", f"subformat={'streamOptimized' if compress else 'monolithicSparse'}"],
        "vhdx": ["-o", "subformat=dynamic"],
    }.get(disk_format, [])
    if compress and disk_format == "qcow2":
        options = ["-c"]
    control.step(f"writing {target.name}")
    name = source(opened.layer)
    run_qemu_img(
        ["convert", "-O", disk_format, *options, name, str(target)],
        [opened.layer],
        timeout=CONVERT_SECONDS,
        cancelled=control.cancelled,
    )
    control.step(f"comparing {target.name}")
    written = json.dumps(
        {"driver": disk_format, "file": {"driver": "file", "filename": str(target)}}
    )
    done = run_qemu_img(
        ["compare", name, f"json:{written}"],
        [opened.layer],
        timeout=CONVERT_SECONDS,
        cancelled=control.cancelled,
        accept=(0, 1),
    )
    if done.returncode:
        raise ImageError(
            f"{target.name} differs from the image: {done.stdout.strip()}",
            hint="qemu-img or the host's disk is at fault: check both",
        )


def _write_oci(disk: Path, folder: Path, name: str, architecture: str) -> None:
    """Write an OCI image layout whose only layer has a disk; equal disks give equal bytes."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layer = blobs / "layer"
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as tar, disk.open("rb") as content:
        tar.addfile(_entry("disk", mode=0o555, kind=tarfile.DIRTYPE))
        tar.addfile(_entry(f"disk/{name}", mode=0o440, size=disk.stat().st_size), content)
    digest = hash_file(layer)
    described = {"mediaType": LAYER, "digest": f"sha256:{digest}", "size": layer.stat().st_size}
    layer.rename(blobs / digest)
    platform = {"architecture": OCI_ARCHITECTURES.get(architecture, architecture), "os": "linux"}
    config = _add_blob(
        blobs,
        CONFIG,
        {**platform, "config": {}, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}},
    )
    manifest = _add_blob(
        blobs,
        MANIFEST,
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [described]},
    )
    entry = {
        **manifest,
        "platform": platform,
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
    }
    (folder / "index.json").write_bytes(
        _as_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]})
    )
    (folder / "oci-layout").write_bytes(_as_json({"imageLayoutVersion": "1.0.0"}))


def _entry(
    name: str, *, mode: int, size: int = 0, kind: bytes = tarfile.REGTYPE
) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size = kind, mode, size
    entry.uid = entry.gid = QEMU_USER
    return entry


def _add_blob(blobs: Path, media_type: str, document: dict[str, Any]) -> dict[str, Any]:
    """Write a JSON document to a file named by its digest; return its descriptor."""
    content = _as_json(document)
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _as_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
