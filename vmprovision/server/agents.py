"""Query the agents of guests. A guest is hostile, so size, time and form of answers are limited."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from vmprovision.errors import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.server.rows import VmRow

SECONDS = 3.0
ANSWER_BYTES = 1 << 20
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
AGENT_PORT = 8080
LARGEST = 1 << 62

_NUMBERS = ("cpu_usage_percent", "memory_usage_percent", "load_average")
_INTEGERS = ("memory_used_kb", "memory_total_kb", "process_count", "uptime_seconds")


class AgentError(Exception):
    """The agent's answer is missing or wrong; the message says how, and is safe to print."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A body that an agent sent."""

    content: bytes
    is_text: bool

    @property
    def media_type(self) -> str:
        """The media type of the body: one of two, whatever the guest stated."""
        return TEXT_TYPE if self.is_text else JSON_TYPE


def authority(address: str) -> str:
    """Return an agent's address and port in the form of a URL."""
    return f"[{address}]:{AGENT_PORT}" if ":" in address else f"{address}:{AGENT_PORT}"


class AgentClient:
    """A client of many agents; threads share it."""

    def __init__(self) -> None:
        """Prepare a client that uses no proxy and follows no redirect."""
        self._client = httpx.Client(
            trust_env=False,
            follow_redirects=False,
            timeout=SECONDS,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def get(self, address: str, path: str, *, accept: str = JSON_TYPE) -> Answer:
        """Return the agent's answer to a GET.

        Raises:
            AgentError: it does not answer with 200, in time and within the limit.
        """
        url = f"http://{authority(address)}{path}"
        deadline = time.monotonic() + SECONDS
        content = bytearray()
        try:
            with self._client.stream("GET", url, headers={"Accept": accept}) as response:
                if response.status_code != httpx.codes.OK:
                    raise AgentError(f"{path} answered with status {response.status_code}")
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > ANSWER_BYTES or time.monotonic() > deadline:
                        raise AgentError(f"the answer of {path} is too long or too slow")
                is_text = response.headers.get("content-type", "").startswith("text/plain")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
            raise AgentError(f"{path}: {printable(str(exc)) or type(exc).__name__}") from exc
        return Answer(content=bytes(content), is_text=is_text)

    def get_json(self, address: str, path: str) -> dict[str, Any]:
        """Return the JSON object in the agent's answer.

        Raises:
            AgentError: as ``get``, or it is not a JSON object.
        """
        try:
            found = json.loads(self.get(address, path).content)
        except (ValueError, RecursionError) as exc:
            raise AgentError(f"{path} did not answer with JSON") from exc
        if not isinstance(found, dict):
            raise AgentError(f"{path} did not answer with a JSON object")
        return found

    def identify(self, vm: VmRow, address: str) -> str:
        """Check that a VM's agent is healthy at an address; return its answer as a sentence.

        Raises:
            AgentError: it does not answer, is not healthy, or is another guest's.
        """
        health = self.get_json(address, "/health")
        if health.get("status") != "healthy":
            raise AgentError("/health does not report a healthy agent")
        named = self.get_json(address, "/info").get("vm_id")
        if named != vm.id:
            shown = printable(str(named))[:80]
            raise AgentError(f"the agent at {address} belongs to {shown}, not to this VM")
        version = printable(str(health.get("version")))[:40]
        return f"/health answers at {address}: healthy, agent {version}"


def sample_of(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Return the columns of a sample; a value that violates the contract becomes None."""
    numbers = {name: _number(metrics.get(name)) for name in _NUMBERS}
    return {**numbers, **{name: _count(metrics.get(name)) for name in _INTEGERS}}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else None


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < LARGEST else None
