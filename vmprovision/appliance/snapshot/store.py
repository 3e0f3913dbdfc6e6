"""The saved appliances of this user in the cache: what is trusted, found, made and removed.

libguestfs's own appliance is built again from its supermin inputs, with a lean process 1
(``inside/init``), and booted by QEMU with its memory in a file. As soon as guestfsd is
about to serve, the machine is stopped and its state is saved. All files are in one folder,
whose name is a hash of what the appliance was made of:

``kernel``, ``initrd``, ``root``
    what supermin built.
``root.qcow2``
    what was written to the root until then.
``ram``, ``state``
    the memory, sparse, and everything else of the machine.
``qemu``
    the script that libguestfs starts in place of QEMU: it restores the machine.
``saved.json``
    what it was made of, and the status of every file when it was complete.

The memory holds programs that work on everybody's images. So the folder is for its owner
alone, and a file that has changed is not used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.handle import SPECIAL
from vmprovision.appliance.snapshot.build import STEP, WRAPPER, Sources, build
from vmprovision.appliance.snapshot.identity import digest
from vmprovision.appliance.snapshot.ingredients import (
    UnusableApplianceError,
    ingredients,
    supermin_inputs,
    supermin_kernel,
)
from vmprovision.appliance.snapshot.packages import package_lists, versions_inside
from vmprovision.appliance.snapshot.scratch import SCRATCH
from vmprovision.appliance.wrapper import booting_script, find_binder
from vmprovision.errors import (
    ApplianceError,
    ApplianceTimeoutError,
    BundledRuntimeError,
    CommandError,
    VmprovisionError,
)
from vmprovision.host.cache import (
    build_directory,
    cache_directory,
    make_private,
    require_private,
    write_atomically,
)

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.progress import Control
    from vmprovision.qemu.options import Accelerator

log = logging.getLogger(__name__)

MANIFEST = "saved.json"
SUSPECT = "failed-once"
# How a machine failed that could not be saved; another accelerator may avoid that.
FAILURES = {"hung": ApplianceTimeoutError, "failed": ApplianceError}
FILES = ("kernel", "initrd", "root", "root.qcow2", "ram", "state", SCRATCH, WRAPPER)
KEPT = 3  # of different QEMUs or versions of vmprovision, side by side
RETRY_SECONDS = 3600.0  # a build that failed is not tried again for so long


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAppliance:
    """An appliance that is complete and unchanged.

    Attributes:
        folder: where its files are.
        wrapper: the script to start in place of QEMU.
        made_of: what it was made of, as ``saved.json`` has it.
        made: when, in seconds since the epoch.
        size: bytes that its files take on the host's disk.
    """

    folder: Path
    wrapper: Path
    made_of: dict[str, Any]
    made: float
    size: int

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator on which it was saved, and is restored."""
        return "kvm" if self.made_of["accelerator"] == "kvm" else "tcg"

    def as_json(self) -> dict[str, Any]:
        """Return the appliance as ``vmprovision appliance status --json`` prints it."""
        return {
            "folder": str(self.folder),
            "made": int(self.made),
            "size": self.size,
            "made_of": self.made_of,
        }


def saved_appliance(
    qemu: Path, accelerator: Accelerator, control: Control, *, refresh: bool = False
) -> SavedAppliance:
    """Return the saved appliance of this host and QEMU; build it if there is none.

    Args:
        qemu: the QEMU that runs it.
        accelerator: the one on which it is saved and restored.
        control: progress and cancellation.
        refresh: build it even if there is one, or a build failed a while ago.

    Raises:
        UnusableApplianceError: there can be none here; the message says why.
        CancelledError: the caller cancelled.
    """
    made_of = ingredients(qemu, accelerator)
    folder = _folder(made_of)
    _require_own_cache()
    if SPECIAL & {*str(folder)}:
        raise UnusableApplianceError(
            f"{folder} has characters that QEMU would misread",
            hint="set VMPROVISION_CACHE to a plain path",
        )
    if not refresh:
        if found := _read(folder, made_of):
            return found
        _raise_known_failure(folder)
    try:
        with build_directory(folder, lambda: control.step(STEP)) as directory:
            if not refresh and (found := _read(folder, made_of)):
                return found
            control.step(STEP)
            _build(directory, made_of, qemu, accelerator, control)
            shutil.rmtree(folder, ignore_errors=True)
            directory.rename(folder)
    except (OSError, CommandError, ApplianceError, BundledRuntimeError) as exc:
        raise _remember_failure(folder, exc) from exc
    _failure(folder).unlink(missing_ok=True)
    found = _read(folder, made_of)
    if found is None:
        raise UnusableApplianceError("another program changed the saved appliance after its build")
    _remove_old(folder)
    return found


def find_saved(qemu: Path, accelerator: Accelerator) -> SavedAppliance | None:
    """Return the saved appliance that would be used now; None if it is yet to be built.

    Raises:
        UnusableApplianceError: there can be none here; the message says why.
    """
    made_of = ingredients(qemu, accelerator)
    if _parent().exists():
        _require_own_cache()
    if found := _read(_folder(made_of), made_of):
        return found
    _raise_known_failure(_folder(made_of))
    return None


def bound_qemu(qemu: Path, accelerator: Accelerator) -> Path:
    """Return a script in the cache that runs QEMU and ends with its caller; else QEMU itself."""
    content = booting_script(qemu, accelerator, find_binder()).encode()
    path = _parent() / f"{digest(content)[:16]}.qemu"
    try:
        _require_own_cache()
        if not path.exists():  # libguestfs keeps what it knows of QEMU by the file's age
            write_atomically(path, content)
            path.chmod(0o700)
    except (OSError, UnusableApplianceError) as exc:
        log.info("starting QEMU without a script: %s", exc)
        return qemu
    return path


def clear_saved() -> int:
    """Remove every saved appliance of this user; return their number.

    Raises:
        ApplianceError: one cannot be removed.
    """
    count = 0
    for path in sorted(_parent().glob("*")):
        count += (path / MANIFEST).exists()
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as exc:
            raise ApplianceError(f"{path} cannot be removed: {exc.strerror}") from exc
    return count


def suspect(saved: SavedAppliance) -> None:
    """Note that an appliance did not restore; after the second time another is built."""
    mark = saved.folder / SUSPECT
    with contextlib.suppress(OSError):
        if mark.exists():
            log.warning("the saved appliance failed twice; the next command builds another")
            (saved.folder / MANIFEST).unlink()
        mark.touch()


def _build(
    directory: Path, made_of: dict[str, Any], qemu: Path, accelerator: Accelerator, control: Control
) -> None:
    """Build all files of an appliance in a build directory."""
    inputs = supermin_inputs()
    packages = {"lists": package_lists(), "versions": versions_inside(inputs)}
    sources = Sources(inputs=inputs, kernel=supermin_kernel(), qemu=qemu)
    build(directory, sources, accelerator, control)
    document = {
        "made_of": made_of,
        "packages": packages,
        "files": _statuses(directory),
        "made": time.time(),
    }
    write_atomically(directory / MANIFEST, json.dumps(document).encode())


def _parent() -> Path:
    return cache_directory() / "appliance"


def _folder(made_of: dict[str, Any]) -> Path:
    return _parent() / digest(json.dumps(made_of, sort_keys=True).encode())[:16]


def _failure(folder: Path) -> Path:
    return folder.with_suffix(".failed")


def _require_own_cache() -> None:
    """Refuse a cache to which others can write: programs are run from it."""
    try:
        make_private(_parent())
        require_private(cache_directory(), _parent())
    except OSError as exc:
        raise UnusableApplianceError(f"{exc.filename}: {exc.strerror}") from exc


def _raise_known_failure(folder: Path) -> None:
    """Raise the error of a build that failed a while ago, instead of another build."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        failure = _failure(folder)
        if failure.stat().st_mtime + RETRY_SECONDS > time.time():
            known = json.loads(failure.read_text(encoding="utf-8"))
            kind = FAILURES.get(known["machine"])
            raise UnusableApplianceError(
                f"no appliance could be saved: {known['cause']}",
                hint="`vmprovision appliance build` tries again",
                command="vmprovision appliance build",
                machine=kind(str(known["cause"])) if kind else None,
            )


def _remember_failure(folder: Path, exc: Exception) -> UnusableApplianceError:
    """Keep why a build failed; return the error to raise."""
    cause = exc.message if isinstance(exc, VmprovisionError) else str(exc)
    kinds = [name for name, kind in FAILURES.items() if isinstance(exc, kind)]
    document = {"cause": cause, "machine": kinds[0] if kinds else ""}
    with contextlib.suppress(OSError):
        write_atomically(_failure(folder), json.dumps(document).encode())
    return UnusableApplianceError(
        f"no appliance can be saved: {cause}",
        machine=exc if isinstance(exc, ApplianceError) else None,
    )


def _read(folder: Path, made_of: dict[str, Any]) -> SavedAppliance | None:
    """Return the appliance in a folder, if it is this user's, complete and up to date."""
    try:
        status = folder.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None
        document = json.loads((folder / MANIFEST).read_bytes())
        if document["made_of"] != made_of or document["files"] != _statuses(folder):
            log.info("%s has changed", folder)
            return None
        if not _has_current_packages(folder, document):
            log.info("a package inside %s was upgraded", folder)
            return None
        return SavedAppliance(
            folder=folder,
            wrapper=folder / WRAPPER,
            made_of=made_of,
            made=float(document["made"]),
            size=sum((folder / name).lstat().st_blocks * 512 for name in FILES),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_current_packages(folder: Path, document: dict[str, Any]) -> bool:
    """Return whether the host's packages inside are the ones it was built with.

    They are compared only after the host's list of packages has changed.
    """
    lists, known = package_lists(), document["packages"]
    if known["lists"] == lists:
        return True
    versions = versions_inside(supermin_inputs())
    if versions is None or versions != known["versions"]:
        return False
    current = {**document, "packages": {"lists": lists, "versions": versions}}
    with contextlib.suppress(OSError):  # then they are compared the next time as well
        made = folder.with_suffix(".packages")
        write_atomically(made, json.dumps(current).encode())
        made.replace(folder / MANIFEST)  # fails if another process has removed the folder
    return True


def _statuses(folder: Path) -> dict[str, list[int]]:
    """Return the status of each file: no change of a content leaves all of it the same."""
    found = {}
    for name in FILES:
        status = (folder / name).lstat()
        times = [status.st_mtime_ns, status.st_ctime_ns]
        found[name] = [status.st_size, *times, status.st_ino, status.st_uid, status.st_mode]
    return found


def _remove_old(newest: Path) -> None:
    """Remove all but the last few; processes that run a removed one have its files open."""
    for leftover in _parent().glob("*.building"):  # by a killed process, unless it is recent
        if leftover.stat().st_mtime + RETRY_SECONDS < time.time():
            shutil.rmtree(leftover, ignore_errors=True)
    folders = [path for path in _parent().iterdir() if (path / MANIFEST).exists()]
    for old in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        if old != newest:
            shutil.rmtree(old, ignore_errors=True)
