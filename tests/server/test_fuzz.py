"""Whatever a client sends, the server answers, and never with a fault of its own."""

from __future__ import annotations

import contextlib
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from tests.server.conftest import serving
from vmprovision.server.app import make_app
from vmprovision.server.domain import Machine, domain_xml
from vmprovision.server.limits import Gate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.server.services import Services

EXAMPLES = 10  # of each operation
HOSTILE = 1000
# what is slow on a loaded host is not a fault
UNHURRIED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

hostile_text = st.one_of(
    st.text(max_size=140),
    st.sampled_from(
        [
            "../../etc/passwd",
            "$(reboot)",
            "`reboot`",
            "'; DROP TABLE vms; --",
            "<script>alert(1)</script>",
            "<domain/>",
            "\x1b[2J",
            "a\0b",
            "{{ 7 * 7 }}",
            "%s%n",
            "\u202egnp.exe",
            "]]>",
            "&lt;&amp;",
        ]
    ),
)


@pytest.fixture
def url(services: Services) -> Iterator[str]:
    """Return the URL of a server without workers."""
    with serving(Gate(make_app(services), services.settings)) as found:
        yield found


def test_no_request_makes_a_fault(url: str, services: Services) -> None:
    """Requests that fit the OpenAPI document, and such that do not, get no 500."""
    document = make_app(services).openapi()
    schema = schemathesis.openapi.from_dict(document)
    tried = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        if operation.path.endswith("/events"):
            continue  # the stream of a VM has no end; test_api reads it
        for mode in (GenerationMode("positive"), GenerationMode("negative")):

            @UNHURRIED
            @given(case=operation.as_strategy(generation_mode=mode))
            def no_fault(case: Any) -> None:  # noqa: ANN401 -- schemathesis makes it
                if case.query:
                    case.query.pop("timeout", None)
                    case.query.pop("wait", None)
                response = case.call(base_url=url, timeout=60)
                case.validate_response(response, checks=[not_a_server_error])

            with contextlib.suppress(Unsatisfiable):  # nothing about it can be wrong
                no_fault()
        tried.append(operation.label)
    assert "POST /v1/vms" in tried
    assert len(tried) > 15


@pytest.mark.parametrize("examples", [100, pytest.param(HOSTILE, marks=pytest.mark.slow)])
def test_hostile_bodies(url: str, examples: int) -> None:
    """Hostile names reach neither a fault nor a row that they do not fit into."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:

        @settings(UNHURRIED, max_examples=examples)
        @given(name=hostile_text, template=hostile_text, tag=hostile_text)
        def refused_or_kept(name: str, template: str, tag: str) -> None:
            template_id = "debian" if template[:1] < "P" else template
            body = {"name": name, "template_id": template_id, "tags": [tag]}
            answer = client.post("/v1/vms", json=body)
            assert answer.status_code in (202, 409, 422)
            if answer.status_code == 202:
                item: dict[str, Any] = answer.json()["item"]
                assert (item["name"], item["tags"]) == (name, [tag])
                assert not any(unicodedata.category(char)[0] == "C" for char in name + tag)
                client.delete(f"/v1/vms/{item['id']}")
            else:
                assert "\x1b" not in answer.json()["detail"]

        refused_or_kept()


@settings(UNHURRIED, max_examples=300)
@given(title=hostile_text.filter(lambda t: all(unicodedata.category(c)[0] != "C" for c in t)))
def test_a_name_stays_text_in_a_domain(title: str) -> None:
    """With any VM name, the domain's description has the same elements."""

    def described(text: str) -> ET.Element:
        machine = Machine(
            id="8e837eb4-67b7-4056-ba4e-8ff59488861b",
            title=text,
            installation="x",
            arch="x86_64",
            vcpu=1,
            mem_mib=128,
            disk=Path("/disk"),
            base=Path("/base"),
            base_format="qcow2",
            sectors=512,
            console=Path("/console"),
            network="default",
            accelerator="tcg",
            owner=(1, 2),
        )
        return ET.fromstring(domain_xml(machine))  # noqa: S314 -- our own

    found, plain = described(title), described("plain")
    assert [element.tag for element in found.iter()] == [element.tag for element in plain.iter()]
    assert (found.findtext("title") or "") == title.replace("\r", "\n")
