"""A machine's identity as OEM strings of its SMBIOS (DSP0134, type 11).

An agent in the image reads them by its own names. systemd(1) reads those that begin
with ``io.systemd.credential:`` as credentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vmprovision.errors import PlanError
from vmprovision.guest.configuration import check_manager_url, check_vm_id

if TYPE_CHECKING:
    from vmprovision.planning.injection import InjectOptions

StringKind = Literal["smbios", "credentials"]
PREFIXES: dict[StringKind, str] = {"smbios": "", "credentials": "io.systemd.credential:"}


def make_strings(kind: StringKind, options: InjectOptions) -> tuple[str, ...]:
    """Return the strings with the machine's name and its manager's URL.

    Raises:
        PlanError: neither is given, or an option cannot be passed in strings.
    """
    settings = {
        "vm_id": check_vm_id(options.vm_id) if options.vm_id is not None else None,
        "manager_url": check_manager_url(options.manager_url)
        if options.manager_url is not None
        else None,
    }
    others = (
        *(options.port, options.token, options.read_token, options.listen, options.allow),
        *(options.allow_configure, options.init),
    )
    if any(other is not None for other in others) or options.runtime != "auto":
        raise PlanError(
            f"{kind} strings can hold only the VM id and the manager's URL",
            hint="put other settings into the image, with `vmprovision inject`",
        )
    strings = [
        f"{PREFIXES[kind]}guest_agent.{name}={value}"
        for name, value in settings.items()
        if value is not None
    ]
    if not strings:
        raise PlanError(f"the {kind} strings would be empty", hint="give --vm-id or --manager-url")
    return tuple(strings)
