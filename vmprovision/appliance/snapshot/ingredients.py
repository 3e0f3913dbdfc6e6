"""What a saved appliance is made of: the key under which it is kept in the cache."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.library import guestfs_module
from vmprovision.appliance.snapshot.build import INSIDE, inside_files
from vmprovision.appliance.snapshot.identity import digest, identity
from vmprovision.appliance.snapshot.initrd import WANTED
from vmprovision.appliance.snapshot.machine import COMMAND_LINE, machine_options, wrapper_script
from vmprovision.errors import ApplianceError, BundledRuntimeError
from vmprovision.host.kernel import appliance_kernel
from vmprovision.runtime.store import find_runtime, host_architecture

if TYPE_CHECKING:
    from vmprovision.qemu.options import Accelerator

SCHEMA = 2
MACHINES = ("x86_64",)


class UnusableApplianceError(ApplianceError):
    """There is no saved appliance, for a reason that does not concern a stock one.

    Attributes:
        command: the command that may change that, or an empty string.
        machine: the error of the machine that could not be saved; None if the reason is
            another, which no other accelerator can avoid.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        command: str = "",
        machine: ApplianceError | None = None,
    ) -> None:
        """Keep the command and the machine's error beside the message."""
        super().__init__(message, hint=hint)
        self.command = command
        self.machine = machine


def ingredients(qemu: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Return all that a saved appliance depends on besides the host's packages, as JSON has it.

    Raises:
        UnusableApplianceError: this host lacks one of them.
    """
    machine = host_architecture()
    if machine not in MACHINES:
        raise UnusableApplianceError(
            f"appliances can be saved on {', '.join(MACHINES)} only, and this host is {machine}"
        )
    try:
        runtime = find_runtime(machine)
    except BundledRuntimeError as exc:
        raise UnusableApplianceError(
            exc.message, hint=exc.hint, command=f"vmprovision runtime build {machine}"
        ) from exc
    binding = importlib.util.find_spec("libguestfsmod")
    try:
        return {
            "schema": SCHEMA,
            "accelerator": accelerator,
            "qemu": identity(qemu),
            "libguestfs": _version(),
            "binding": identity(Path(binding.origin)) if binding and binding.origin else None,
            "inputs": [identity(path) for path in sorted(supermin_inputs().iterdir())],
            "kernel": identity(supermin_kernel()),
            "inside": {
                str(path.relative_to(INSIDE)): digest(path.read_bytes()) for path in inside_files()
            },
            "runtime": runtime.sha256,
            "machine": [*machine_options(accelerator), COMMAND_LINE, *WANTED],
            "wrapper": digest(wrapper_script(qemu, accelerator, "").encode()),
            # the state names the processor's features
            "processor": [_processor(), platform.release()] if accelerator == "kvm" else None,
        }
    except OSError as exc:
        raise UnusableApplianceError(f"{exc.filename}: {exc.strerror}") from exc


def supermin_inputs() -> Path:
    """Return the folder from which supermin builds libguestfs's appliance.

    Raises:
        UnusableApplianceError: libguestfs has a fixed appliance, or none.
    """
    path = str(guestfs_module().GuestFS(python_return_dict=True).get_path())
    for folder in path.split(":"):
        if (found := Path(folder) / "supermin.d").is_dir():
            return found
    raise UnusableApplianceError(
        f"libguestfs's path {path} has no supermin.d, so its appliance cannot be built here"
    )


def supermin_kernel() -> Path:
    """Return the kernel that supermin is to take: the newest readable one with its modules.

    Raises:
        UnusableApplianceError: there is none.
    """
    kernel = appliance_kernel()
    if kernel is None:
        raise UnusableApplianceError(
            "no kernel in /boot is readable", hint="`vmprovision doctor` names the command"
        )
    return kernel


def _version() -> str:
    version = guestfs_module().GuestFS(python_return_dict=True).version()
    return f"{version['major']}.{version['minor']}.{version['release']}{version['extra']}"


def _processor() -> str:
    first = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n\n")[0]
    kept = ("vendor_id", "cpu family", "model", "stepping", "microcode", "flags")
    return "\n".join(line for line in first.splitlines() if line.startswith(kept))
