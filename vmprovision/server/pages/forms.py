"""Read the forms of the pages: from this server's own pages only."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from vmprovision.server.pages.rendering import session_of
from vmprovision.server.problems import ProblemError, document_of, unprocessable
from vmprovision.server.services import services_of
from vmprovision.server.sessions import is_form_token

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.errors import VmprovisionError

TYPE = "application/x-www-form-urlencoded"
FIELDS = 50

Form = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """The faults of a form.

    Attributes:
        fields: a sentence for each faulty field.
        problem: why the request as a whole is refused; None if only fields are wrong.
    """

    fields: dict[str, str] = field(default_factory=dict)
    problem: dict[str, Any] | None = None


NO_FAULTS = Faults()


async def read_form(request: Request) -> Form:
    """Return the fields of a form; of two with the same name, the last one.

    Raises:
        ProblemError: it is not a form, or not from one of this server's pages.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != TYPE:
        raise unprocessable("this is not a form of this server's pages")
    try:
        text = (await request.body()).decode("ascii")
        found = parse_qs(text, keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError as exc:
        raise unprocessable("the form cannot be read") from exc
    form = {name: values[-1] for name, values in found.items()}
    installation = services_of(request).store.installation
    if not is_form_token(form.get("form_token", ""), installation, session_of(request)):
        raise ProblemError(
            HTTPStatus.FORBIDDEN,
            "StaleForm",
            "this form does not belong to the session of this browser",
            hint="go back, reload the page, and send the form again",
        )
    return form


PostedForm = Annotated[Form, Depends(read_form)]


def parse_fields(
    model: type[BaseModel], values: Mapping[str, object]
) -> tuple[BaseModel | None, Faults]:
    """Return a form's values as a request of the API, or the form's faults."""
    try:
        return model.model_validate(values), NO_FAULTS
    except ValidationError as exc:
        found = {str(fault["loc"][-1]): _sentence(fault["msg"]) for fault in reversed(exc.errors())}
        tags = next((_sentence(f["msg"]) for f in exc.errors() if f["loc"][0] == "tags"), None)
        return None, Faults(fields={**found, **({"tags": tags} if tags else {})})


def faults_of(error: ProblemError | VmprovisionError) -> Faults:
    """Return the faults of a failed request in the form's terms."""
    return Faults(problem=document_of(error))


def number(text: str) -> int | str | None:
    """Return a number field's value; leave text that is not a number to the form's check."""
    text = text.strip()
    if not text:
        return None
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text  # noqa: PLR2004 -- digits


def _sentence(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Input ").capitalize()
