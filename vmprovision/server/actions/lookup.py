"""Find the VM or template that a client names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmprovision.server.problems import ProblemError, not_found
from vmprovision.server.queries import find_template, find_vm

if TYPE_CHECKING:
    from vmprovision.server.models import Template, Vm
    from vmprovision.server.services import Services

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_id(text: str) -> bool:
    """Return whether this may be a VM's id."""
    return _ID.fullmatch(text) is not None


def require_vm(services: Services, vm_id: str) -> Vm:
    """Return the VM with this id.

    Raises:
        ProblemError: it does not exist.
    """
    found = find_vm(services.store, vm_id) if is_id(vm_id) else None
    if found is None:
        raise no_vm(vm_id)
    return found


def require_template(services: Services, id_or_name: str) -> Template:
    """Return the template with this id or name.

    Raises:
        ProblemError: it does not exist.
    """
    found = find_template(services.store, plain(id_or_name))
    if found is None:
        raise no_template(id_or_name)
    return found


def no_vm(vm_id: str) -> ProblemError:
    """Return the problem of a VM that does not exist."""
    return not_found(f"VM {vm_id[:80]}")


def no_template(id_or_name: str) -> ProblemError:
    """Return the problem of a template that does not exist."""
    return not_found(f"template {id_or_name[:80]}")


def plain(text: str) -> str:
    """Return the text without characters that PostgreSQL does not store."""
    return text.replace("\0", "\ufffd")
