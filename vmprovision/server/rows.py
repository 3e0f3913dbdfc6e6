"""The rows of the store as frozen facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Phase = Literal[
    "requested", "disk", "injected", "defined", "started", "reporting", "ready", "silent"
]
Wanted = Literal["running", "stopped", "paused", "deleted"]
TemplateState = Literal["preparing", "ready", "failed", "deleting"]
DomainState = Literal["absent", "running", "paused", "off", "crashed"]
AgentNeed = Literal["required", "optional"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateRow:
    """A row of the table of templates."""

    id: str
    name: str
    vcpu: int
    mem_mib: int
    rootfs_path: str
    image_format: str | None
    agent: AgentNeed
    is_hidden: bool
    state: TemplateState
    guest: dict[str, Any]
    boot: dict[str, Any] | None
    has_agent: bool
    sha256: str | None
    error: dict[str, Any] | None
    due_at: float
    attempts: int
    lease_owner: str | None
    lease_until: float
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRow:
    """A row of the table of VMs."""

    id: str
    name: str
    template_id: str
    vcpu: int
    mem_mib: int
    tags: list[str]
    host: str | None
    phase: Phase
    phase_at: float
    wanted: Wanted
    domain_state: DomainState
    has_failed: bool
    error: dict[str, Any] | None
    evidence: dict[str, Any]
    guest_ip: str | None
    reported_at: float | None
    answered_at: float | None
    deadline_at: float | None
    stop_at: float | None
    token: str | None
    token_hash: str
    due_at: float
    attempts: int
    lease_owner: str | None
    lease_until: float
    created_at: float
    updated_at: float

    def __repr__(self) -> str:
        """Name the VM without its token, which must not be logged."""
        return f"VmRow(id={self.id!r}, phase={self.phase!r}, wanted={self.wanted!r})"


def vm_row(mapping: Mapping[Any, Any]) -> VmRow:
    """Return a VM from a row of the table ``vms``."""
    return VmRow(**mapping)


def template_row(mapping: Mapping[Any, Any]) -> TemplateRow:
    """Return a template from a row of the table ``templates``."""
    return TemplateRow(**mapping)
