"""The services that the API's functions use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmprovision.guest.facts import GuestInfo
    from vmprovision.server.agents import AgentClient
    from vmprovision.server.settings import ServerSettings
    from vmprovision.server.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of a running server.

    Attributes:
        wake: tells the workers that there is work.
        inspect: returns the facts about an image's guest, or raises if it cannot be injected.
    """

    settings: ServerSettings
    store: Store
    agents: AgentClient
    wake: Callable[[], None]
    inspect: Callable[[Path, str | None], GuestInfo]


def services_of(request: Request) -> Services:
    """Return the services of the application that handles this request."""
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(services_of)]
