"""Render a service's files from the Jinja2 templates in ``templates/``.

Each init system has a folder there; ``shared`` holds what several init systems use.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.changes.receipt import AGENT, CONFIGURATION, LOGS
from vmprovision.guest.configuration import DEFAULT_PORT
from vmprovision.host.data import data_directory

if TYPE_CHECKING:
    import jinja2

PRIVILEGED_PORTS = 1024
NAME = "guest-agent"  # of the service and of its files


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The facts about the agent that templates need.

    Attributes:
        name: the name of the service and of its files.
        command: the absolute guest path of the program.
        configuration: the absolute guest path of its settings.
        log: the agent's own log file, for an init system that keeps no log.
        port: the TCP port that it listens on.
        user: the user that the agent becomes after it has read its settings and opened
            its port, except under systemd with dynamic users. It is root if the agent
            may configure interfaces.
        vsock: whether it listens on vsock(7).
    """

    name: str = NAME
    description: str = "Guest agent: health and metrics over HTTP"
    command: str = str(AGENT)
    configuration: str = str(CONFIGURATION)
    log: str = str(LOGS[0])
    port: int = DEFAULT_PORT
    user: str = "nobody"
    vsock: bool = False

    @property
    def privileged_port(self) -> bool:
        """Return whether listening on the port needs a capability."""
        return self.port < PRIVILEGED_PORTS


def render(template: str, **context: Any) -> bytes:  # noqa: ANN401 -- Jinja2's own types
    """Return the content of one file; an undefined name in a template raises ``UndefinedError``."""
    return _environment().get_template(template).render(**context).encode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2  # noqa: PLC0415 -- it takes long, and `inspect` and `verify` render nothing

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_directory("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 -- shell scripts and units, not HTML; values are checked
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
