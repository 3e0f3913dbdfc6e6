"""The server's own state for Prometheus: the agents' addresses, metrics, health."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

import vmprovision
from vmprovision.server.agents import authority
from vmprovision.server.api import make_router
from vmprovision.server.models import Health, TargetGroup
from vmprovision.server.phases import PHASES
from vmprovision.server.queries import count_by_phase, list_vms
from vmprovision.server.services import Served  # noqa: TC001 -- FastAPI evaluates it

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.server.store import Store

router = make_router("discovery")
plain_router = APIRouter(tags=["server"])

PREFIX = "__meta_vmprovision_"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/sd")
def discover(services: Served) -> list[TargetGroup]:
    """List every agent whose address is known, for Prometheus' `http_sd_configs`."""
    return [
        TargetGroup(
            targets=[authority(vm.guest_ip)],
            labels={
                f"{PREFIX}id": vm.id,
                f"{PREFIX}name": vm.name,
                f"{PREFIX}template": vm.template_name,
                f"{PREFIX}host": vm.host or "",
                # between commas, so that an expression can match a whole tag
                f"{PREFIX}tags": f",{','.join(vm.tags)}," if vm.tags else "",
            },
        )
        for vm in list_vms(services.store)
        if vm.guest_ip is not None and vm.wanted == "running"
    ]


@plain_router.get("/health")
def health() -> Health:
    """Say that this server lives, in the words of the agent."""
    return Health(status="healthy", timestamp=int(time.time()), version=vmprovision.__version__)


@plain_router.get("/metrics", response_class=Response)
def own_metrics(services: Served) -> Response:
    """Return this server's own metrics, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StoreCollector(services.store))
    return Response(generate_latest(registry), media_type=TEXT_TYPE)


class _StoreCollector:
    """Counts what is in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics, as prometheus_client asks for them."""
        info = GaugeMetricFamily(
            "vmprovision_build_info", "The version of this server.", labels=["version"]
        )
        info.add_metric([vmprovision.__version__], 1)
        yield info
        counts = count_by_phase(self._store)
        family = GaugeMetricFamily("vmprovision_vms", "VMs by phase.", labels=["phase"])
        for phase in (*PHASES, "silent", "failed"):
            family.add_metric([phase], counts.get(phase, 0))
        yield family
