"""Build a bootable disk image from a recipe; keep it in the cache under its recipe's hash.

The image appears under its name as a whole or not at all.  A second builder of the
same image waits for the first, and takes the image that it built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from typing import TYPE_CHECKING, BinaryIO

from vmprovision.appliance.session import ApplianceCallError, Drive, launch
from vmprovision.errors import RecipeError
from vmprovision.host.cache import build_directory, cache_directory
from vmprovision.host.command import run
from vmprovision.host.workspace import make_workspace_in
from vmprovision.recipe.disk import install_boot_loader, mount_new_filesystems
from vmprovision.recipe.packages import HOST_FILES, make_guest_files
from vmprovision.recipe.schema import find_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.appliance.session import Appliance
    from vmprovision.progress import Control
    from vmprovision.recipe.schema import Recipe

COPY_SECONDS = 900.0
TAR_SECONDS = 1800.0


def build_image(  # noqa: PLR0913 -- all but the name by keyword
    name: str,
    *,
    output: Path | None = None,
    refresh: bool = False,
    control: Control,
    recipes: Path | None = None,
    tarball: Path | None = None,
) -> Path:
    """Return the image of a recipe: the one in the cache, or a copy of it at ``output``.

    The cached image is built if it is missing.  It is read-only and shared: work on an
    overlay of it or on a copy.

    Args:
        name: the recipe's name.
        output: where to write a copy; nothing may exist there.
        refresh: build the image even if the cache has it, with the newest packages.
        control: progress and cancellation.
        recipes: the folder that holds the recipe, if it is not one of vmprovision's own.
        tarball: the recipe's tarball, if it is not beside ``recipe.toml``; or the
            folder that holds it.

    Raises:
        RecipeError: there is no such recipe, it is invalid, it cannot be built on
            this host, or ``output`` exists.
        ApplianceError: the appliance failed.
        CancelledError: the caller cancelled.
    """
    recipe = find_recipe(name, recipes)
    if output is not None:
        _refuse_existing(output)
    cached = cache_directory() / "images" / f"{recipe.name}-{recipe.key()}.qcow2"
    if refresh or not cached.exists():
        given = _find_tarball(recipe, tarball)
        _build_cached(recipe, cached, given, refresh=refresh, control=control)
    if output is None:
        return cached
    control.step(f"copying the image to {output}")
    _copy(cached, output, control)
    return output


def _find_tarball(recipe: Recipe, given: Path | None) -> Path | None:
    """Return the path of a recipe's tarball, whose content is not checked yet."""
    if recipe.tarball is None:
        if given is not None:
            raise RecipeError(f"recipe {recipe.name} takes no tarball")
        return None
    name = recipe.tarball.name
    path = given or recipe.folders[-1]
    if path.is_dir():
        path /= name
    if not path.is_file():
        raise RecipeError(
            f"recipe {recipe.name} needs {name}, and there is no {path}",
            hint="get it from its distribution, and give its path or its folder with --tarball",
        )
    return path


def _build_cached(
    recipe: Recipe, cached: Path, tarball: Path | None, *, refresh: bool, control: Control
) -> None:
    asked = time.time()
    waiting = "waiting for another build of this image"
    with build_directory(cached, lambda: control.step(waiting)) as directory:
        if cached.exists() and (not refresh or cached.stat().st_mtime > asked):
            return  # another builder built it while this one waited
        _build(recipe, directory, cached, tarball, control)


def _build(
    recipe: Recipe, directory: Path, target: Path, tarball: Path | None, control: Control
) -> None:
    tar, disk = directory / "guest.tar", directory / "disk.qcow2"
    root = _copy_tarball(recipe, tarball, directory) if tarball else None
    control.step(f"installing the packages of {recipe.name}")
    make_guest_files(recipe, tar, control)
    control.step("copying the packages to a disk")
    run(
        ["qemu-img", "create", "-q", "-f", "qcow2", disk, f"{recipe.disk.size_mb}M"],
        timeout=COPY_SECONDS,
    )
    with launch([Drive(path=disk, format="qcow2")], control=control) as appliance:
        _fill_disk(appliance, recipe, root, tar, control)
    control.step("storing the image in the cache")
    disk.chmod(0o444)
    with disk.open("rb") as written:
        os.fsync(written.fileno())
    disk.replace(target)


def _copy_tarball(recipe: Recipe, tarball: Path, directory: Path) -> Path:
    """Return a checked copy of the tarball that no other user can write to."""
    copy = directory / "root.tar"
    try:
        shutil.copyfile(tarball, copy)
        with copy.open("rb") as file:
            found = _sha256(file)
    except OSError as exc:
        raise RecipeError(f"{tarball}: {exc.strerror}") from exc
    if recipe.tarball is None or found != recipe.tarball.sha256:
        raise RecipeError(
            f"{tarball} is not the tarball of recipe {recipe.name}: its SHA-256 is {found}",
            hint="get the version that the recipe names, or put this SHA-256 into the recipe",
        )
    return copy


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _fill_disk(
    appliance: Appliance, recipe: Recipe, root: Path | None, tar: Path, control: Control
) -> None:
    mount_new_filesystems(appliance, recipe.disk)
    if root is not None and recipe.tarball is not None:
        # `tar_in` follows links of the filesystem, but this one is empty, and tar(1) refuses
        # names with ".." and those that lead through the archive's own links.
        try:
            _unpack(appliance, root, recipe.tarball.compression)
        except ApplianceCallError as exc:
            raise RecipeError(
                f"{recipe.tarball.name} could not be unpacked: {exc.message}",
                hint="names in the archive must stay inside it and not lead through its links",
            ) from exc
    # Links are not followed here either: this archive has an entry for every directory that
    # it writes into, and tar(1) replaces a link by a directory.
    _unpack(appliance, tar, None)
    if recipe.disk.bootloader != "none":
        control.step("installing the boot loader")
        install_boot_loader(appliance, recipe)
    for path in (*HOST_FILES, *recipe.remove):
        appliance.call("rm_rf", path)
    appliance.call("umount_all")


def _unpack(appliance: Appliance, tar: Path, compression: str | None) -> None:
    """Unpack an archive in the guest's root, inside the appliance."""
    options = {"compress": compression} if compression else {}
    appliance.call("tar_in", str(tar), "/", xattrs=True, limit=TAR_SECONDS, **options)


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise RecipeError(f"{output} exists", hint="name another file, or remove it first")
    if not output.absolute().parent.is_dir():
        raise RecipeError(f"there is no directory {output.absolute().parent}")


def _copy(cached: Path, output: Path, control: Control) -> None:
    """Copy the image to a folder beside ``output``, then rename it unless that exists by now."""
    try:
        workspace = make_workspace_in(output.absolute().parent, ".vmprovision-")
        try:
            copy = workspace.path / output.name
            run(
                ["cp", "--reflink=auto", "--sparse=always", cached, copy],
                timeout=COPY_SECONDS,
                cancelled=control.cancelled,
            )
            copy.chmod(0o644)
            _rename_to_new(copy, output)
        finally:
            workspace.remove()
    except OSError as exc:
        raise RecipeError(f"cannot write {output}: {exc.strerror}") from exc


def _rename_to_new(copy: Path, output: Path) -> None:
    try:
        os.link(copy, output)  # unlike a rename, it never replaces a file
    except FileExistsError:
        _refuse_existing(output)
    except OSError:  # a filesystem without hard links
        _refuse_existing(output)
        copy.replace(output)
