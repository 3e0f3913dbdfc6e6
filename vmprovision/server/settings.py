"""What ``vmprovision serve`` was told on its command line."""

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
    """Where the server listens: a TCP address, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @property
    def is_private(self) -> bool:
        """Whether only this host can connect."""
        return self.path is not None or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        """Return the address as ``--listen`` takes it."""
        if self.path is not None:
            return f"{UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that ``--listen`` names: ``HOST:PORT``, ``[IPV6]:PORT``, ``unix:PATH``.

    Raises:
        PlanError: it is none of these.
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
    """How the server works.

    Attributes:
        listen: where clients connect.
        state: the folder of templates, disks and consoles.
        database: SQLAlchemy's URL of the store.
        hosts: libvirt's URIs; a VM goes to the one with most free memory.
        network: the libvirt network that every VM is on.
        manager_url: where agents report their address; None: at the network's own
            address on the host, where nothing else is answered.
        report_port: the port of that address.
        tokens: who may do what; None: everybody who can connect.
        open_reports: take reports without a token, for agents that have none.
        image_folders: ``rootfs_path`` must be below one of these.
        scheduler: a Dask scheduler that does the injections.
        report_seconds: how long a started guest may take to report.
        stop_seconds: how long a guest may take to shut down before it is switched off.
        lease_seconds: after so long without a sign of life, another server takes over.
        builders: how many VMs are made at once.
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
        """Refuse to serve strangers without a token, and guests that cannot report.

        Raises:
            PlanError: others than this host can connect, and there is no token file; or there
                are other hosts, and no address that their guests can report to.
        """
        others = self.hosts[1:] or [uri for uri in self.hosts if not uri.startswith(LOCAL)]
        if self.manager_url is None and others:
            raise PlanError(
                f"guests on {others[0]} cannot reach this server at their own host's address",
                hint="give --manager-url with an address that the guests of every host reach",
            )
        if self.tokens is None and not self.listen.is_private:
            raise PlanError(
                f"--listen {self.listen} can be reached from other hosts, and nobody needs a token",
                hint="give --token-file FILE with a line 'admin TOKEN', or listen on 127.0.0.1",
            )


def default_state() -> Path:
    """Return the folder for templates and disks: of the system for root, else of the user."""
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
