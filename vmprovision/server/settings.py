"""The settings of ``vmprovision serve``, from its command line."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vmprovision.errors import PlanError
from vmprovision.host.cache import state_directory

if TYPE_CHECKING:
    from vmprovision.server.access import Tokens

SYSTEM_STATE = Path("/var/lib/vmprovision")
DEFAULT_PORT = 8080
UNIX = "unix:"
LOCAL = "qemu:///"  # how the URI of this host's libvirt begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A listen address: a TCP address, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @property
    def is_private(self) -> bool:
        """Whether only this host can connect."""
        return self.path is not None or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        """Return the address in the form of ``--listen``."""
        if self.path is not None:
            return f"{UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address in ``--listen``: ``HOST:PORT``, ``[IPV6]:PORT``, ``unix:PATH``.

    Raises:
        PlanError: it has none of these forms.
    """
    hint = "give it as 127.0.0.1:8080, [::1]:8080 or unix:/PATH"
    if text.startswith(UNIX):
        path = Path(text.removeprefix(UNIX))
        if not path.is_absolute():
            raise PlanError(f"the server cannot listen on {text!r}", hint=hint)
        return Address(path=path)
    try:
        parts = urlsplit(f"//{text}")
        host = parts.hostname or ""
        port = DEFAULT_PORT if parts.port is None else parts.port
        ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as exc:
        raise PlanError(f"the server cannot listen on {text!r}", hint=hint) from exc
    if parts.netloc != text or "@" in text:
        raise PlanError(f"the server cannot listen on {text!r}", hint=hint)
    return Address(host="127.0.0.1" if host == "localhost" else host, port=port)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The server's settings.

    Attributes:
        listen: the address for clients.
        state: the folder of templates, disks and consoles.
        database: SQLAlchemy's URL of the store.
        hosts: libvirt URIs; a VM goes to the host with the most free memory.
        network: the libvirt network of all VMs.
        manager_url: where agents report their address.  None means the host's address in the
            network, where nothing else is served.
        report_port: the port of that address.
        tokens: the clients' tokens; None lets everybody who can connect do everything.
        open_reports: take reports without a token, for agents that have none.
        image_folders: ``rootfs_path`` must be below one of these.
        scheduler: the address of a Dask scheduler for the injections.
        report_seconds: the time limit for a started guest's report.
        stop_seconds: the time limit for a shutdown, after which the guest is switched off.
        lease_seconds: another server takes over after so long without a renewal.
        builders: the number of VMs that are created at once.
    """

    listen: Address = field(default_factory=lambda: parse_address("127.0.0.1:8080"))
    state: Path
    database: str
    hosts: tuple[str, ...] = ("qemu:///system",)
    network: str = "default"
    manager_url: str | None = None
    report_port: int = DEFAULT_PORT
    tokens: Tokens | None = None
    open_reports: bool = False
    image_folders: tuple[Path, ...] = ()
    scheduler: str | None = None
    report_seconds: float = 600.0
    stop_seconds: float = 20.0
    lease_seconds: float = 15.0
    builders: int = 2

    def __post_init__(self) -> None:
        """Refuse to serve other hosts without a token file, or guests that cannot report.

        Raises:
            PlanError: other hosts can connect, and there is no token file; or guests run on
                other hosts, and there is no address that they can report to.
        """
        others = self.hosts[1:] or [uri for uri in self.hosts if not uri.startswith(LOCAL)]
        if self.manager_url is None and others:
            raise PlanError(
                f"guests on {others[0]} cannot reach this server at their own host's address",
                hint="give --manager-url with an address that the guests of every host reach",
            )
        if self.tokens is None and not self.listen.is_private:
            raise PlanError(
                f"--listen {self.listen} can be reached from other hosts, and no token is required",
                hint="give --token-file FILE with a line 'admin TOKEN', or listen on 127.0.0.1",
            )


def default_state() -> Path:
    """Return the folder for templates and disks: the system's for root, else the user's."""
    return SYSTEM_STATE if os.geteuid() == 0 else state_directory() / "server"


def database_url(text: str | None, state: Path) -> str:
    """Return SQLAlchemy's URL for ``--database``: a URL, a path, or a file in the state folder.

    Raises:
        PlanError: it is a URL of another database.
    """
    if text is None:
        return f"sqlite:///{state}/server.db"
    scheme, separator, rest = text.partition("://")
    if not separator:
        return f"sqlite:///{Path(text).absolute()}"
    if scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        return f"postgresql+psycopg://{rest}"
    if scheme == "sqlite":
        return text
    raise PlanError(
        f"the database {scheme}:// is not supported",
        hint="give a path for SQLite, or postgresql://USER@HOST/NAME",
    )
