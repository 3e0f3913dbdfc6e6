"""The saved appliance: booted once on this host, and restored for every image after that.

libguestfs's own appliance is built again from its supermin inputs, with a lean
process 1 (``inside/init``), and booted by QEMU with its memory in a file.  As soon
as guestfsd is about to serve, the machine is stopped and its state is saved.  All
of it stands in one folder of the cache, whose name says what it was made of:

``kernel``, ``initrd``, ``root``
    what supermin made.
``root.qcow2``
    what was written to the root until then.
``ram``, ``state``
    the memory, sparse, and all else of the machine.
``qemu``
    the program that libguestfs starts in place of QEMU: it restores the machine.
``saved.json``
    what it was made of, and what the files looked like when they were complete.

The memory holds programs that will work on everybody's images, so the folder is
for its owner alone, and files that are not as they were left are not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.library import guestfs_module
from vmprovision.appliance.snapshot.build import (
    INSIDE,
    STEP,
    WRAPPER,
    build,
    inside_files,
)
from vmprovision.appliance.snapshot.hardware import (
    COMMAND_LINE,
    SPECIAL,
    bound_script,
    machine_options,
    wrapper_script,
)
from vmprovision.errors import (
    ApplianceError,
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
from vmprovision.host.kernel import host_kernels
from vmprovision.runtime.store import find_runtime, host_architecture

if TYPE_CHECKING:
    from vmprovision.progress import Control
    from vmprovision.qemu.accelerator import Accelerator

log = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "saved.json"
SUSPECT = "failed-once"
FILES = ("kernel", "initrd", "root", "root.qcow2", "ram", "state", WRAPPER)
KEPT = 3  # of different QEMUs or versions of vmprovision, side by side
RETRY_SECONDS = 3600.0  # what failed is not tried again for so long
MACHINES = ("x86_64",)
# Where packages are listed: the appliance is made of the host's own programs.
PACKAGE_LISTS = (
    "/var/lib/dpkg/status",
    "/usr/lib/sysimage/rpm/rpmdb.sqlite",
    "/var/lib/rpm/rpmdb.sqlite",
    "/var/lib/rpm/Packages",
    "/var/lib/pacman/local",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedAppliance:
    """An appliance that is complete and as it was left.

    Attributes:
        folder: where its files are.
        wrapper: the program to start in place of QEMU.
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
        """What it was saved on, and is restored on."""
        return "kvm" if self.made_of["accelerator"] == "kvm" else "tcg"

    def as_json(self) -> dict[str, Any]:
        """The appliance as ``vmprovision appliance status --json`` prints it."""
        return {
            "folder": str(self.folder),
            "made": int(self.made),
            "size": self.size,
            "made_of": self.made_of,
        }


class UnusableApplianceError(ApplianceError):
    """There is no saved appliance, for a reason that does not concern a stock one.

    Attributes:
        command: the command that may change that, or an empty string.
    """

    def __init__(self, message: str, *, hint: str = "", command: str = "") -> None:
        """Keep the command beside the message."""
        super().__init__(message, hint=hint)
        self.command = command


def saved_appliance(
    qemu: Path, accelerator: Accelerator, control: Control, *, refresh: bool = False
) -> SavedAppliance:
    """The saved appliance of this host and QEMU; made now where there is none.

    Args:
        qemu: the QEMU that runs it.
        accelerator: what it is saved and restored on.
        control: progress and cancellation.
        refresh: make it anew, whatever is there, and though it failed a while ago.

    Raises:
        UnusableApplianceError: there can be none here; the message says why.
        CancelledError: the caller cancelled.
    """
    made_of = ingredients(qemu, accelerator)
    folder = _folder(made_of)
    _require_own_cache()
    if SPECIAL & {*str(folder)}:
        raise UnusableApplianceError(f"{folder} has characters that QEMU would misread")
    if not refresh:
        if found := _read(folder, made_of):
            return found
        _raise_known_failure(folder)
    try:
        with build_directory(folder, lambda: control.step(STEP)) as directory:
            if not refresh and (found := _read(folder, made_of)):
                return found
            control.step(STEP)
            build(directory, supermin_inputs(), qemu, accelerator, control)
            document = {"made_of": made_of, "files": _look(directory), "made": time.time()}
            write_atomically(directory / MANIFEST, json.dumps(document).encode())
            shutil.rmtree(folder, ignore_errors=True)
            directory.rename(folder)
    except (OSError, CommandError, ApplianceError, BundledRuntimeError) as exc:
        cause = exc.message if isinstance(exc, VmprovisionError) else str(exc)
        with contextlib.suppress(OSError):
            write_atomically(_failure(folder), json.dumps({"cause": cause}).encode())
        raise UnusableApplianceError(f"no appliance can be saved: {cause}") from exc
    _failure(folder).unlink(missing_ok=True)
    found = _read(folder, made_of)
    if found is None:
        raise UnusableApplianceError("the saved appliance was changed as soon as it was made")
    _remove_old(folder)
    return found


def find_saved(qemu: Path, accelerator: Accelerator) -> SavedAppliance | None:
    """The saved appliance that would be used now; None where it is yet to be made.

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
    """A program of the cache that is QEMU, and ends with whoever starts it; else QEMU itself."""
    content = bound_script(qemu, accelerator).encode()
    path = _parent() / f"{_digest(content)[:16]}.qemu"
    try:
        _require_own_cache()
        if not path.exists():  # its age is part of what libguestfs remembers of it
            write_atomically(path, content)
            path.chmod(0o700)
    except (OSError, UnusableApplianceError) as exc:
        log.info("QEMU is started as it is: %s", exc)
        return qemu
    return path


def clear_saved() -> int:
    """Remove every saved appliance of this user; how many there were.

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
    """Let another one be made the second time that one does not restore."""
    mark = saved.folder / SUSPECT
    with contextlib.suppress(OSError):
        if mark.exists():
            log.warning("the saved appliance failed twice and is made anew the next time")
            (saved.folder / MANIFEST).unlink()
        mark.touch()


def ingredients(qemu: Path, accelerator: Accelerator) -> dict[str, Any]:
    """All that a saved appliance depends on, as JSON has it.

    Raises:
        UnusableApplianceError: this host lacks one of them.
    """
    machine = host_architecture()
    if machine not in MACHINES:
        raise UnusableApplianceError(f"appliances are saved on {', '.join(MACHINES)} only")
    try:
        runtime = find_runtime(machine)
    except BundledRuntimeError as exc:
        raise UnusableApplianceError(
            exc.message, hint=exc.hint, command=f"vmprovision runtime build {machine}"
        ) from exc
    binding = importlib.util.find_spec("libguestfsmod")
    packages = [Path(name) for name in PACKAGE_LISTS]
    try:
        return {
            "schema": SCHEMA,
            "accelerator": accelerator,
            "qemu": _identity(qemu),
            "libguestfs": _version(),
            "binding": _identity(Path(binding.origin)) if binding and binding.origin else None,
            "inputs": [_identity(path) for path in sorted(supermin_inputs().iterdir())],
            "kernels": [_identity(path) for path in host_kernels() if path.exists()],
            "packages": [_identity(path) for path in packages if path.exists()],
            "inside": {
                str(path.relative_to(INSIDE)): _digest(path.read_bytes()) for path in inside_files()
            },
            "runtime": runtime.sha256,
            "machine": [*machine_options(accelerator), COMMAND_LINE],
            "wrapper": _digest(wrapper_script(qemu, accelerator).encode()),
            # the processor's features are in the state
            "processor": [_processor(), platform.release()] if accelerator == "kvm" else None,
        }
    except OSError as exc:
        raise UnusableApplianceError(f"{exc.filename}: {exc.strerror}") from exc


def supermin_inputs() -> Path:
    """The folder that libguestfs's appliance is made from.

    Raises:
        UnusableApplianceError: libguestfs has a fixed appliance, or none.
    """
    path = str(guestfs_module().GuestFS(python_return_dict=True).get_path())
    for folder in path.split(":"):
        if (found := Path(folder) / "supermin.d").is_dir():
            return found
    raise UnusableApplianceError(f"libguestfs's path {path} has no supermin.d")


def _parent() -> Path:
    return cache_directory() / "appliance"


def _folder(made_of: dict[str, Any]) -> Path:
    return _parent() / _digest(json.dumps(made_of, sort_keys=True).encode())[:16]


def _failure(folder: Path) -> Path:
    return folder.with_suffix(".failed")


def _require_own_cache() -> None:
    """Refuse a cache that somebody else could write to: what is in it will be run."""
    try:
        make_private(_parent())
        require_private(cache_directory(), _parent())
    except OSError as exc:
        raise UnusableApplianceError(f"{exc.filename}: {exc.strerror}") from exc


def _raise_known_failure(folder: Path) -> None:
    """Do not try again what failed a while ago."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        failure = _failure(folder)
        if failure.stat().st_mtime + RETRY_SECONDS > time.time():
            cause = json.loads(failure.read_text(encoding="utf-8"))["cause"]
            raise UnusableApplianceError(
                f"no appliance could be saved: {cause}",
                hint="`vmprovision appliance build` tries again",
                command="vmprovision appliance build",
            )


def _read(folder: Path, made_of: dict[str, Any]) -> SavedAppliance | None:
    """The appliance in a folder, if it is this user's, complete and untouched."""
    try:
        status = folder.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None
        document = json.loads((folder / MANIFEST).read_bytes())
        if document["made_of"] != made_of or document["files"] != _look(folder):
            log.info("%s is not as it was left", folder)
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


def _look(folder: Path) -> dict[str, list[int]]:
    """What each file looks like: no content can be changed and leave all of it the same."""
    found = {}
    for name in FILES:
        status = (folder / name).lstat()
        times = [status.st_mtime_ns, status.st_ctime_ns]
        found[name] = [status.st_size, *times, status.st_ino, status.st_uid, status.st_mode]
    return found


def _remove_old(newest: Path) -> None:
    """Keep the last few; whoever runs one that goes has all of its files open."""
    for leftover in _parent().glob("*.building"):  # of a killed process, but for a lately begun one
        if leftover.stat().st_mtime + RETRY_SECONDS < time.time():
            shutil.rmtree(leftover, ignore_errors=True)
    folders = [path for path in _parent().iterdir() if (path / MANIFEST).exists()]
    for old in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        if old != newest:
            shutil.rmtree(old, ignore_errors=True)


def _version() -> str:
    version = guestfs_module().GuestFS(python_return_dict=True).version()
    return f"{version['major']}.{version['minor']}.{version['release']}{version['extra']}"


def _processor() -> str:
    first = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n")[0]
    kept = ("vendor_id", "cpu family", "model", "stepping", "microcode", "flags")
    return "\n".join(line for line in first.splitlines() if line.startswith(kept))


def _identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
