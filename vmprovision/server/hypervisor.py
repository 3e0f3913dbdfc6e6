"""The interface to libvirt: the only module that imports its binding.

A domain belongs to this store if its UUID and its name are the VM's id, and its
metadata name the store. Every function that changes a domain checks that first.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.errors import HypervisorError
from vmprovision.server.domain import NAMESPACE
from vmprovision.server.settings import LOCAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from vmprovision.server.rows import DomainState

XML_LIMIT = 1 << 20
CAPABILITIES_SECONDS = 60.0


class HypervisorUnreachableError(HypervisorError):
    """There is no connection to libvirt now; it may come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A libvirt network with an address of the host in it."""

    address: str
    subnet: ipaddress.IPv4Network | ipaddress.IPv6Network


def _load() -> ModuleType:
    """Return libvirt's binding, which belongs to the distribution's Python.

    Raises:
        HypervisorError: it is not installed.
    """
    try:
        module = importlib.import_module("libvirt")
    except ImportError as exc:
        raise HypervisorError(
            "libvirt's Python binding is not installed",
            hint="`vmprovision doctor --server` names the package",
        ) from exc
    module.registerErrorHandler(lambda *_: None, None)  # otherwise the binding prints each error
    return module


class Hypervisor:
    """A host with libvirt, shared by threads; each call opens its own connection."""

    def __init__(self, uri: str, installation: str) -> None:
        """Keep the host's URI, and the store's name, which marks its domains.

        Raises:
            HypervisorError: the binding is not installed.
        """
        self.uri = uri
        self._installation = installation
        self._libvirt = _load()
        self._known: tuple[ET.Element | None, float] = (None, 0.0)

    @property
    def is_local(self) -> bool:
        """Whether libvirt's machines run on this host."""
        return self.uri.startswith(LOCAL)

    def free_memory(self) -> int:
        """Return the host's free bytes; its file cache counts as free."""
        with self._connected() as connection:
            found: dict[str, int] = connection.getMemoryStats(-1)
        return sum(found.get(name, 0) for name in ("free", "buffers", "cached")) << 10

    def processors(self) -> int:
        """Return the number of the host's processors."""
        with self._connected() as connection:
            return int(connection.getInfo()[2])

    def qemu_owner(self) -> tuple[int, int] | None:
        """Return the user and group that QEMU runs as, or None if libvirt does not say."""
        for model in self._capabilities().iterfind("host/secmodel"):
            if model.findtext("model") == "dac":
                user, _, group = (model.findtext("baselabel") or "").partition(":")
                with contextlib.suppress(ValueError):
                    return int(user.lstrip("+")), int(group.lstrip("+"))
        return None

    def has_kvm(self, arch: str) -> bool:
        """Return whether libvirt offers KVM for machines of an architecture."""
        found = self._capabilities().iterfind(f"guest/arch[@name='{arch}']/domain[@type='kvm']")
        return next(found, None) is not None

    def _capabilities(self) -> ET.Element:
        """Return what libvirt says of its host, at most a minute old.

        If ``/dev/kvm`` exists but does not work, libvirt examines QEMU again for each answer.
        """
        known, at = self._known
        if known is None or time.monotonic() - at > CAPABILITIES_SECONDS:
            with self._connected() as connection:
                known = ET.fromstring(connection.getCapabilities()[:XML_LIMIT])  # noqa: S314 -- libvirt's own
            self._known = known, time.monotonic()
        return known

    def network(self, name: str) -> Network:
        """Return the host's address in a network.

        Raises:
            HypervisorError: the network does not exist, or the host has no address in it.
        """
        with self._connected() as connection:
            found = connection.networkLookupByName(name).XMLDesc(0)
        for element in ET.fromstring(found[:XML_LIMIT]).iterfind("ip"):  # noqa: S314 -- libvirt's own
            address = element.get("address", "")
            length = element.get("netmask") or element.get("prefix") or "32"
            subnet = ipaddress.ip_interface(f"{address}/{length}").network
            return Network(address=address, subnet=subnet)
        raise HypervisorError(
            f"this host has no address in libvirt's network {name}",
            hint="give --manager-url with the address that guests reach this server at",
        )

    def is_active(self, name: str) -> bool:
        """Return whether a network can be used now."""
        with self._connected() as connection:
            return bool(connection.networkLookupByName(name).isActive())

    def state_of(self, vm_id: str) -> DomainState:
        """Return the state of a VM's domain; ``absent`` if there is none.

        Raises:
            HypervisorError: a domain with this UUID belongs to another program.
        """
        with self._connected() as connection:
            domain = self._find(connection, vm_id)
            return "absent" if domain is None else self._state(domain)

    def lacks_room(self, vm_id: str) -> bool:
        """Return whether a domain stands still because a write to its disk failed."""
        with self._connected() as connection:
            domain = self._find(connection, vm_id)
            reason = self._libvirt.VIR_DOMAIN_PAUSED_IOERROR
            return (
                domain is not None
                and self._state(domain) == "paused"
                and domain.state()[1] == reason
            )

    def define(self, vm_id: str, xml: str) -> None:
        """Define a domain, or define it again.

        Raises:
            HypervisorError: libvirt refuses, or such a domain belongs to another program.
        """
        with self._connected() as connection:
            self._find(connection, vm_id)
            connection.defineXML(xml)

    def start(self, vm_id: str) -> None:
        """Start a domain, unless it runs."""
        self._act(vm_id, ("off", "crashed"), lambda domain: domain.create())

    def shut_down(self, vm_id: str) -> None:
        """Ask a guest to shut down."""
        self._act(vm_id, ("running",), lambda domain: domain.shutdown())

    def switch_off(self, vm_id: str) -> None:
        """End a domain at once."""
        self._act(vm_id, ("running", "paused"), lambda domain: domain.destroy())

    def pause(self, vm_id: str) -> None:
        """Pause a domain."""
        self._act(vm_id, ("running",), lambda domain: domain.suspend())

    def resume(self, vm_id: str) -> None:
        """Let a paused domain continue."""
        self._act(vm_id, ("paused",), lambda domain: domain.resume())

    def remove(self, vm_id: str) -> None:
        """End a domain and remove its definition, if it exists."""
        self.switch_off(vm_id)
        flags = self._libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        everything = ("running", "paused", "off", "crashed")
        self._act(vm_id, everything, lambda domain: domain.undefineFlags(flags))

    def _act(self, vm_id: str, states: tuple[str, ...], action: Callable[[Any], object]) -> None:
        """Call an action on a domain that is in one of these states; otherwise do nothing.

        The state may change in between. Then libvirt refuses, and the next check
        decides.
        """
        with self._connected() as connection:
            domain = self._find(connection, vm_id)
            if domain is not None and self._state(domain) in states:
                action(domain)

    def _find(self, connection: Any, vm_id: str) -> Any:  # noqa: ANN401 -- libvirt's objects
        """Return a VM's domain, or None.

        Raises:
            HypervisorError: it belongs to another program.
        """
        for look in (connection.lookupByUUIDString, connection.lookupByName):
            try:
                domain = look(vm_id)
            except self._libvirt.libvirtError as exc:
                if exc.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN:
                    continue
                raise
            if not self._is_ours(domain, vm_id):
                raise HypervisorError(
                    f"the domain {domain.UUIDString()} on {self.uri} belongs "
                    "to another program, and is not changed",
                    hint=f"virsh -c {self.uri} dumpxml {vm_id} shows whose it is",
                )
            return domain
        return None

    def _is_ours(self, domain: Any, vm_id: str) -> bool:  # noqa: ANN401 -- libvirt's object
        if domain.UUIDString() != vm_id or domain.name() != vm_id:
            return False
        kind = self._libvirt.VIR_DOMAIN_METADATA_ELEMENT
        try:
            found = domain.metadata(kind, NAMESPACE, 0)
        except self._libvirt.libvirtError as exc:
            if exc.get_error_code() == self._libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return False
            raise
        element = ET.fromstring(found[:XML_LIMIT])  # noqa: S314 -- libvirt has parsed it
        return element.get("installation") == self._installation

    def _state(self, domain: Any) -> DomainState:  # noqa: ANN401 -- libvirt's object
        words: dict[int, DomainState] = {
            self._libvirt.VIR_DOMAIN_PAUSED: "paused",
            self._libvirt.VIR_DOMAIN_SHUTOFF: "off",
            self._libvirt.VIR_DOMAIN_CRASHED: "crashed",
        }
        return words.get(domain.state()[0], "running")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Open a connection for the block.

        Raises:
            HypervisorUnreachableError: libvirt does not answer, or the connection was lost.
            HypervisorError: libvirt refused a request.
        """
        try:
            connection = self._libvirt.open(self.uri)
        except self._libvirt.libvirtError as exc:
            raise self._unreachable(exc) from exc
        try:
            yield connection
        except self._libvirt.libvirtError as exc:
            if not self._is_alive(connection):
                raise self._unreachable(exc) from exc
            raise HypervisorError(f"libvirt at {self.uri} refused: {exc}", hint=_hint(exc)) from exc
        finally:
            with contextlib.suppress(self._libvirt.libvirtError):
                connection.close()

    def _is_alive(self, connection: Any) -> bool:  # noqa: ANN401 -- libvirt's object
        """Return whether libvirt still answers on a connection."""
        try:
            connection.getLibVersion()
        except self._libvirt.libvirtError:
            return False
        return True

    def _unreachable(self, exc: Exception) -> HypervisorUnreachableError:
        return HypervisorUnreachableError(
            f"libvirt at {self.uri} cannot be reached: {exc}",
            hint="start libvirtd; `vmprovision doctor --server` names what is missing",
        )


def _hint(exc: Exception) -> str:
    """Return the next step for an error of libvirt."""
    text = str(exc)
    if "network" in text and "not active" in text:
        return "virsh net-start NAME, and virsh net-autostart NAME for the next boot"
    if "network" in text.lower() and "not found" in text.lower():
        return "virsh net-list --all shows the networks; --network chooses one"
    return "libvirt's logs say more: /var/log/libvirt on its host"
