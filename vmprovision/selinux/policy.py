"""The facts about a guest's SELinux policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vmprovision.selinux.filecontexts import FileContexts


@dataclass(frozen=True, slots=True, kw_only=True)
class SELinuxPolicy:
    """The guest's SELinux configuration: selinux(8)'s ``/etc/selinux/config``.

    Attributes:
        contexts: the policy's labels for paths, or None if its rules cannot be used.
        obstacle: why files cannot get their labels from here, as the end of a
            sentence; empty if they can.
        takes_labels: whether labels can be written to its filesystem.
    """

    mode: Literal["enforcing", "permissive", "disabled"]
    policy: str
    contexts: FileContexts | None = None
    obstacle: str = ""
    takes_labels: bool = True
