"""The forms of requests and answers; FastAPI checks them and derives the OpenAPI document."""

from __future__ import annotations

import ipaddress
import unicodedata
from datetime import datetime  # noqa: TC003 -- pydantic evaluates it
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vmprovision.server.phases import StateWord  # noqa: TC001 -- likewise
from vmprovision.server.rows import AgentNeed, Phase, TemplateState, Wanted  # noqa: TC001

LARGEST_VCPU = 256
LARGEST_MEMORY = 1 << 21  # MiB
TAGS = 32


def _printable(text: str) -> str:
    """Return the text, if a line of a page or a log can show all of it."""
    if text != text.strip() or any(unicodedata.category(char)[0] == "C" for char in text):
        raise ValueError("must hold no control characters, and no spaces at its ends")
    if any(unicodedata.category(char) in ("Zl", "Zp") for char in text):
        raise ValueError("must be one line")
    return text


def _guest_address(text: str) -> str:
    """Return the address of a guest in its usual form, if it may be one."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
        raise ValueError("must be an address without a zone")
    if (
        address.is_loopback
        or address.is_unspecified
        or address.is_multicast
        or address.is_link_local
        or address == ipaddress.IPv4Address("255.255.255.255")
    ):
        raise ValueError("must be an address at which a guest can be reached")
    return str(address)


Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Tag = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Tags = Annotated[list[Tag], Field(max_length=TAGS)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]
Vcpu = Annotated[int, Field(ge=1, le=LARGEST_VCPU)]
Memory = Annotated[int, Field(ge=16, le=LARGEST_MEMORY)]
GuestAddress = Annotated[str, Field(min_length=2, max_length=64), AfterValidator(_guest_address)]


class _Own(BaseModel):
    """A request of our own: unknown members are refused, and no value is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Compatible(BaseModel):
    """A request of NQRust-MicroVM's clients: members that mean nothing here are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class CreateVm(_Own):
    """Create a VM from a template."""

    name: Name
    template_id: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        description="The id or the name of a template."
    )
    vcpu: Vcpu | None = Field(default=None, description="Default: the template's.")
    mem_mib: Memory | None = Field(default=None, description="Default: the template's.")
    tags: Tags = Field(default_factory=list)


class CreateVmOfImage(_Compatible):
    """Create a VM from an image, as NQRust-MicroVM's clients do; the image is kept as it is."""

    name: Name
    rootfs_path: Path = Field(description="An image below one of the server's image folders.")
    vcpu: Vcpu
    mem_mib: Memory
    tags: Tags = Field(default_factory=list)


class UpdateVm(_Own):
    """Change what a VM is called."""

    name: Name | None = None
    tags: Tags | None = None


class TemplateSpec(_Compatible):
    """What every VM of a template gets."""

    vcpu: Vcpu = 1
    mem_mib: Memory = 512
    rootfs_path: Path = Field(description="An image below one of the server's image folders.")
    format: Literal["raw", "qcow2", "vmdk", "vdi", "vhdx"] | None = Field(
        default=None, description="The image's format, if its name does not say it."
    )
    agent: AgentNeed = Field(
        default="required",
        description="`optional`: a guest that cannot be injected is started without an agent.",
    )


class WriteTemplate(_Compatible):
    """Register an image as a template, or replace what a template says."""

    name: Name
    spec: TemplateSpec


class UpdateSpec(_Own):
    """What can change without another image."""

    vcpu: Vcpu | None = None
    mem_mib: Memory | None = None


class UpdateTemplate(_Own):
    """Change some of a template."""

    name: Name | None = None
    spec: UpdateSpec | None = None


class Instantiate(_Compatible):
    """Create a VM from the template in the URL."""

    name: Name


class ReportAddress(_Compatible):
    """What an agent reports."""

    guest_ip: GuestAddress


class Evidence(BaseModel):
    """What was seen when a VM came into a phase."""

    at: datetime
    detail: str


class Vm(BaseModel):
    """A VM. `phase` is how far it has come; `ready` means that its agent answers."""

    id: str
    name: str
    state: StateWord
    phase: Phase
    phase_at: datetime
    wanted: Wanted
    template_id: str
    template_name: str
    vcpu: int
    mem_mib: int
    tags: list[str]
    host: str | None
    rootfs_path: str
    guest_ip: str | None
    reported_at: datetime | None
    answered_at: datetime | None
    evidence: dict[str, Evidence]
    error: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime


class VmAnswer(BaseModel):
    """One VM."""

    item: Vm


class VmCreated(BaseModel):
    """A VM that will be made."""

    id: str
    item: Vm


class VmList(BaseModel):
    """All VMs, the newest first."""

    items: list[Vm]


class SpecOfTemplate(BaseModel):
    """What every VM of a template gets."""

    vcpu: int
    mem_mib: int
    rootfs_path: str
    format: str | None
    agent: AgentNeed


class Template(BaseModel):
    """A template. VMs start from a copy of its image, which has the agent in it."""

    id: str
    name: str
    state: TemplateState
    spec: SpecOfTemplate
    guest: dict[str, Any]
    has_agent: bool
    sha256: str | None
    vm_count: int
    error: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime


class TemplateAnswer(BaseModel):
    """One template."""

    item: Template


class TemplateCreated(BaseModel):
    """A template that is being prepared."""

    id: str
    item: Template


class TemplateList(BaseModel):
    """All templates, by name."""

    items: list[Template]


class Event(BaseModel):
    """Something that happened to a VM."""

    id: int
    vm_id: str
    at: datetime
    kind: str
    message: str


class Sample(BaseModel):
    """One answer of an agent's `/metrics`."""

    vm_id: str
    recorded_at: datetime
    cpu_usage_percent: float | None
    memory_usage_percent: float | None
    memory_used_kb: int | None
    memory_total_kb: int | None
    load_average: float | None
    process_count: int | None
    uptime_seconds: int | None


class Problem(BaseModel):
    """An error, by RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    kind: str
    hint: str
    exit_code: int | None = None


class TargetGroup(BaseModel):
    """Targets of Prometheus' HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]


class Health(BaseModel):
    """The server's own health, in the words of the agent's."""

    status: str
    timestamp: int
    version: str
