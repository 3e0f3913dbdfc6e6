"""Finished bakes in the cache, each a folder named by the hash of all its inputs.

A cached bake is not trusted: all its files are hashed again, and it is removed if a
hash differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision import __version__
from vmprovision.bake.files import has_right_sums, put_in_place, sync_tree, writing
from vmprovision.host.cache import cache_directory, make_private
from vmprovision.host.command import run
from vmprovision.host.workspace import make_workspace_in
from vmprovision.recipe import find_recipe
from vmprovision.runtime.store import list_runtimes

if TYPE_CHECKING:
    from vmprovision.bake.loading import LoadedBakeFile
    from vmprovision.planning.injection import InjectOptions
    from vmprovision.progress import Control
    from vmprovision.runtime.archive import Archive

# Part of every key: increase it when the same bake file gives different files.
SCHEMA = 1
DOCUMENT = "bake.json"
DOCUMENT_LIMIT = 64 << 20
COPY_SECONDS = 3600.0
KEPT_SECONDS = 30 * 24 * 3600.0  # since its last use


def make_key(loaded: LoadedBakeFile, options: InjectOptions, archive: Archive) -> str:
    """Return a hash of all inputs of a bake: source, options, agent, runtime, versions.

    Raises:
        RecipeError: the source's recipe is invalid.
        BundledRuntimeError: the list of runtimes is damaged.
    """
    source = loaded.bake.source
    said = loaded.bake.model_dump()
    # the source's location makes no difference
    for name in ("image", "url", "recipes", "tarball"):
        del said["source"][name]
    said["source"]["keyring"] = _hash_of(loaded, source.keyring)
    for name in ("token_file", "read_token_file"):
        del said["agent"][name]
    if source.recipe is not None:
        recipes = loaded.beside(source.recipes) if source.recipes else None
        said["source"]["recipe"] = find_recipe(source.recipe, recipes).key()
    if loaded.bake.prove is not None:
        said["prove"] |= {
            name: _hash_of(loaded, getattr(loaded.bake.prove, name))
            for name in ("kernel", "initrd")
        }
    made_from = {
        "schema": SCHEMA,
        "version": __version__,
        "name": loaded.name,
        "bake": said,
        "options": {**asdict(options), "runtime": _runtime(options)},
        "agent": archive.sha256,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _hash_of(loaded: LoadedBakeFile, name: str | None) -> str | None:
    """Return the hash of a file that the bake file names, or its name if it cannot be read."""
    if name is None:
        return None
    try:
        return hashlib.sha256(loaded.beside(name).read_bytes()).hexdigest()
    except OSError:
        return name


def _runtime(options: InjectOptions) -> Any:  # noqa: ANN401 -- any JSON value
    """Return the inputs of the runtime: the choice, and every runtime that it may select."""
    choice = options.runtime
    if isinstance(choice, Path):
        try:
            return hashlib.sha256(choice.read_bytes()).hexdigest()
        except OSError:
            return str(choice)
    if choice == "guest":
        return choice
    return [choice, sorted(runtime.sha256 for runtime in list_runtimes())]


def holds_bake(folder: Path, key: str, control: Control) -> bool:
    """Return whether a folder is the finished bake of this key, after hashing every file in it."""
    return key_in(folder) == key and has_right_sums(folder, control)


def key_in(folder: Path) -> str | None:
    """Return the key of the bake in a folder, or None."""
    try:
        with (folder / DOCUMENT).open("rb") as file:
            document = json.loads(file.read(DOCUMENT_LIMIT))
        return str(document["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_cached(key: str, control: Control) -> Path | None:
    """Return the cached bake of a key after checking all its hashes, or None."""
    folder = _place() / key
    if not folder.is_dir():
        return None
    control.step("checking the cached bake")
    if not holds_bake(folder, key, control):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(folder)
    return folder


def keep(folder: Path, key: str) -> None:
    """Copy a finished bake into the cache, and remove bakes that have not been used for long.

    Raises:
        ImageError: the host has too little free space.
    """
    place = _place()
    with writing(place):
        make_private(place)
        workspace = make_workspace_in(place, ".vmprovision-")
        try:
            copy = workspace.path / "bake"
            copy_folder(folder, copy)
            put_in_place(copy, place / key)
        finally:
            workspace.remove()
        for old in place.iterdir():
            if time.time() - old.lstat().st_mtime > KEPT_SECONDS:
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink(missing_ok=True)


def copy_folder(folder: Path, target: Path) -> None:
    """Copy a folder to a new path, sharing its blocks if the filesystem can.

    Raises:
        CommandError: cp(1) failed.
        OSError: the disk failed.
    """
    run(
        ["cp", "--recursive", "--reflink=auto", "--sparse=always", "--", folder, target],
        timeout=COPY_SECONDS,
    )
    sync_tree(target)


def lock_of(key: str) -> Path:
    """Return the lock file for the bake of a key."""
    return _place() / f"{key}.lock"


def _place() -> Path:
    return cache_directory() / "bake"
