"""The files of a service from the Jinja2 templates in ``templates/``, one folder an init system."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jinja2

from vmprovision.changes.receipt import AGENT, CONFIGURATION, LOGS
from vmprovision.guest.configuration import DEFAULT_PORT
from vmprovision.host.data import data_directory

PRIVILEGED_PORTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What every init system is told about the agent.

    Attributes:
        name: of the service, and of its files.
        command: absolute guest path of the program.
        configuration: absolute guest path of its settings.
        log: where it writes when its init system keeps no log.
        port: the TCP port that it listens on.
        user: whom the agent becomes once it has read its settings and opened its port,
            where the init system has no way of its own to run it without privileges; root
            where it may configure interfaces.
        vsock: whether it listens on vsock(7).
    """

    name: str = "guest-agent"
    description: str = "Guest agent: health and metrics over HTTP"
    command: str = str(AGENT)
    configuration: str = str(CONFIGURATION)
    log: str = str(LOGS[0])
    port: int = DEFAULT_PORT
    user: str = "nobody"
    vsock: bool = False

    @property
    def privileged_port(self) -> bool:
        """Whether listening on the port takes a capability."""
        return self.port < PRIVILEGED_PORTS


def render(template: str, **context: Any) -> bytes:  # noqa: ANN401 -- Jinja2's own types
    """The content of one file; a name that a template misses is an error, never empty text."""
    return _environment().get_template(template).render(**context).encode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_directory("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 -- shell scripts and units, not HTML; values are checked
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
