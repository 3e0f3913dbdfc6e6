"""An image and every file that it refers to, each opened and locked before QEMU starts.

QEMU by itself opens the files that a header names. So this module describes the whole
chain to QEMU as open files instead. QEMU then opens only what was checked, even if a
name leads elsewhere by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.errors import CommandError, ImageError, ImageReferenceError, printable
from vmprovision.host.command import run
from vmprovision.image.diskfile import (
    DiskFile,
    name_for_others,
    name_of,
    open_disk_file,
)
from vmprovision.image.header import FORMATS, read_references, refuse_nested_vmdk

if TYPE_CHECKING:
    import subprocess
    import threading
    from collections.abc import Callable, Iterator, Sequence

CHAIN_LIMIT = 32
CLUSTERS = (4 << 10, 8 << 10, 16 << 10, 32 << 10)
QEMU_CLUSTER = 64 << 10
FIRST_LEVEL_SIZE = 64 << 10
_QCOW2_ENTRY = 8  # bytes of an entry of the tables of both levels
_QCOW2_BACKING_PLACE = 8  # of the header: where the backing file's name is, and how long
_QCOW2_BACKING = struct.Struct(">QI")
_QCOW2_SIZE_PLACE = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One image of a chain.

    Attributes:
        file: the image itself.
        format: its disk format.
        data: the other files that hold its data, in the order in which the image names
            them.
        backing: the backing image, or None.
        descriptor: for a VMDK in pieces, a link to the image in a private folder. Links
            to the pieces are beside it under the names that the image uses, because
            QEMU finds them only by name.
    """

    file: DiskFile
    format: str
    data: tuple[DiskFile, ...] = ()
    backing: Layer | None = None
    descriptor: Path | None = None

    def chain(self) -> tuple[Layer, ...]:
        """Return this image and all images below it, top first."""
        return (self, *(self.backing.chain() if self.backing else ()))

    def files(self) -> tuple[DiskFile, ...]:
        """Return every open file of the chain, the image's own file first."""
        return tuple(file for layer in self.chain() for file in (layer.file, *layer.data))

    def describe(self, name: Callable[[int], str]) -> dict[str, Any]:
        """Return the QAPI description of the block node, with the nodes that it refers to.

        Args:
            name: returns the file name by which QEMU opens an open file.
        """
        filename = str(self.descriptor) if self.descriptor else name(self.file.handle)
        described: dict[str, Any] = {"driver": self.format, "file": _file(filename)}
        if self.format == "qcow2":
            described["backing"] = self.backing.describe(name) if self.backing else None
            for data in self.data:
                described["data-file"] = _file(name(data.handle))
        return described


def _file(name: str) -> dict[str, Any]:
    """Return the node of a file. QEMU must not lock it, because this process holds the lock."""
    return {"driver": "file", "filename": name, "locking": "off"}


@contextlib.contextmanager
def open_chain(
    image: DiskFile, disk_format: str, *, allow_outside: bool, write: bool
) -> Iterator[Layer]:
    """Open the image and every file that it refers to, after checking each reference.

    Args:
        image: the open image.
        disk_format: its format.
        allow_outside: follow references out of the image's folder.
        write: lock the image's own data files for writing.

    Raises:
        ImageReferenceError: a reference is not a plain file name, leads out of the
            image's folder, has no stated format, or is part of a circle.
        ImageCorruptError: a header of the chain is damaged.
        ImageLockedError: another program writes to one of the files.
    """
    with contextlib.ExitStack() as stack:
        opener = _Opener(stack, image.path.parent.resolve(), allow_outside=allow_outside)
        yield opener.layer(image, disk_format, [], write=write)


@contextlib.contextmanager
def _reached_from(image: DiskFile) -> Iterator[None]:
    """Prefix an error about a referenced file with the image's name."""
    try:
        yield
    except ImageError as exc:
        exc.sentence = printable(f"{image}: ") + exc.sentence
        raise


class _Opener:
    def __init__(self, stack: contextlib.ExitStack, folder: Path, *, allow_outside: bool) -> None:
        self._stack = stack
        self._folder = folder
        self._allow_outside = allow_outside

    def layer(
        self, file: DiskFile, disk_format: str, above: Sequence[tuple[int, int]], *, write: bool
    ) -> Layer:
        """Return the image and all layers below it."""
        if len(above) > CHAIN_LIMIT:
            raise ImageReferenceError(
                f"{file}: its chain of backing files has no end",
                hint="look at it with qemu-img info -U, and repair or merge it",
            )
        references = read_references(file, disk_format)
        chain = [*above, file.identity]
        data = tuple(self._open(file, name, chain, write=write) for name in references.data)
        descriptor = None
        if disk_format == "vmdk" and data:
            with _reached_from(file):
                for extent in data:
                    refuse_nested_vmdk(extent)
            descriptor = self._link_pieces(file, references.data, data)
        backing = None
        if references.backing is not None:
            if references.backing_format not in FORMATS:
                raise ImageReferenceError(
                    f"{file} names the backing file {references.backing} in no supported format",
                    hint="state it: qemu-img rebase -u -F FORMAT -b BACKING IMAGE",
                )
            below = self._open(file, references.backing, chain, write=False)
            with _reached_from(file):
                backing = self.layer(below, references.backing_format, chain, write=False)
        return Layer(
            file=file, format=disk_format, data=data, backing=backing, descriptor=descriptor
        )

    def _open(
        self, image: DiskFile, name: str, chain: Sequence[tuple[int, int]], *, write: bool
    ) -> DiskFile:
        path, target = self._allowed(image, name)
        status = target.stat()
        if (status.st_dev, status.st_ino) in chain:
            raise ImageReferenceError(
                f"{image} refers to {name}, which refers to it: a circle",
                hint="look at it with qemu-img info -U, and repair or merge it",
            )
        with _reached_from(image):
            return self._stack.enter_context(open_disk_file(path, write=write, at=target))

    def _allowed(self, image: DiskFile, name: str) -> tuple[Path, Path]:
        """Return a reference's path as QEMU resolves it, and the file that it leads to."""
        if not name or "\0" in name or ":" in name.partition("/")[0]:
            raise ImageReferenceError(
                f"{image} refers to {name or 'nothing'}, which is not a plain file name",
                hint="only files are followed; merge the image with qemu-img convert",
            )
        path = image.path.parent / name
        try:
            target = path.resolve()
            there = target.is_file()
        except (OSError, RuntimeError):  # too long a name, or a circle of links
            there = False
        if not there:
            raise ImageReferenceError(
                f"{image} refers to {name}, which is not a file",
                hint="put that file where the image looks for it",
            )
        if not self._allow_outside and target.parent != self._folder:
            raise ImageReferenceError(
                f"{image} refers to {target}, outside the image's folder",
                hint="if you trust the image, allow it with --allow-backing",
            )
        return path, target

    def _link_pieces(
        self, file: DiskFile, names: Sequence[str], pieces: Sequence[DiskFile]
    ) -> Path:
        """Return the VMDK in a folder of links to the open files, where QEMU finds its pieces.

        Raises:
            ImageReferenceError: the name of a piece leads out of the folder.
        """
        folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vmprovision-vmdk-"))
        )
        for name, piece in zip(names, pieces, strict=True):
            link = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ImageReferenceError(
                    f"{file} is a VMDK whose piece {name} is not in its folder or below",
                    hint="merge it with qemu-img convert",
                )
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(name_for_others(piece.handle))
        descriptor = folder / "descriptor"
        while descriptor.is_symlink() or descriptor.exists():
            descriptor = descriptor.with_name(f"{descriptor.name}-")
        descriptor.symlink_to(name_for_others(file.handle))
        return descriptor


def source(layer: Layer) -> str:
    """Return the name of an image for a program that inherits its open files."""
    return "json:" + json.dumps(layer.describe(name_of))


def run_qemu_img(  # noqa: PLR0913 -- one parameter for each thing that differs
    words: Sequence[str],
    layers: Sequence[Layer],
    *,
    timeout: float,
    accept: Sequence[int] = (0,),
    keep: Sequence[int] = (),
    memory: int | None = None,
    cancelled: threading.Event | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run qemu-img on images named by ``source``; its error messages show the images' paths.

    It inherits the open files with their locks. So the locks are held as long as it
    runs, even if this process is killed.

    Args:
        words: its arguments.
        layers: the images in them.
        timeout: seconds after which it is killed.
        accept: the exit statuses that count as success.
        keep: other open files that it inherits.
        memory: bytes of address space that it may have. Only where it reads one thing
            after another: its threads for the rest take address space with the host's size.
        cancelled: set it to end the program.

    Raises:
        CommandError: qemu-img failed, or exceeded its limit of memory or time.
        CancelledError: ``cancelled`` was set.
    """
    files = [file for layer in layers for file in layer.files()]
    try:
        return run(
            ["qemu-img", *words],
            timeout=timeout,
            accept=accept,
            keep=[*(file.handle for file in files), *keep],
            memory=memory,
            cancelled=cancelled,
        )
    except CommandError as exc:
        shown = {source(layer): str(layer.file) for layer in layers}
        shown |= {name_of(file.handle): str(file) for file in files}
        message, stderr = exc.message, exc.stderr
        for name, path in shown.items():
            message, stderr = message.replace(name, path), stderr.replace(name, path)
        raise CommandError(message, stderr=stderr, hint=exc.hint) from exc


def make_overlay(file: DiskFile, base: Layer) -> None:
    """Make an empty overlay over an open file, without naming that file in its header.

    Raises:
        ImageError: the overlay cannot be made.
    """
    over = Layer(file=file, format="qcow2", backing=base)
    clusters = f"cluster_size={_cluster_size(base)}"
    words = ["create", "-q", "-f", "qcow2", "-o", clusters, "-F", base.format, "-b", source(base)]
    try:
        run_qemu_img([*words, name_of(file.handle)], [over], timeout=60)
    except CommandError as exc:
        raise ImageError(
            f"cannot make a redo log for {base.file}: {exc.message}",
            hint="run `vmprovision doctor` to check this host",
        ) from exc
    forget_backing(file)


def _cluster_size(base: Layer) -> int:
    """Return the smallest cluster with which the overlay's table of the first level is small.

    A block that is written for the first time is copied with the whole cluster around it. An
    injection wrote 1.2 MiB with QEMU's own size, and 0.3 MiB with 4 KiB.
    """
    if base.format not in ("raw", "qcow2"):
        return QEMU_CLUSTER
    size = base.file.size if base.format == "raw" else virtual_size(base.file)
    for cluster in CLUSTERS:
        covered = cluster * cluster // _QCOW2_ENTRY
        if size <= covered * (FIRST_LEVEL_SIZE // _QCOW2_ENTRY):
            return cluster
    return QEMU_CLUSTER


def name_backing(over: Layer) -> None:
    """Write the name of the open files below an overlay into its header, for programs that need it.

    The name is valid while this process holds the files open.

    Raises:
        CommandError: the header cannot be written.
    """
    if over.backing is not None:
        named = "json:" + json.dumps(over.backing.describe(name_for_others))
        words = ["rebase", "-q", "-u", "-f", "qcow2", "-F", over.backing.format, "-b", named]
        run_qemu_img([*words, name_of(over.file.handle)], [over], timeout=60)


def forget_backing(overlay: DiskFile) -> None:
    """Remove the backing file's name from an overlay's header."""
    os.pwrite(overlay.handle, bytes(_QCOW2_BACKING.size), _QCOW2_BACKING_PLACE)


def virtual_size(overlay: DiskFile) -> int:
    """Return the virtual disk size of an overlay."""
    (size,) = struct.unpack(">Q", overlay.read(8, _QCOW2_SIZE_PLACE))
    return int(size)
