"""The operations of a plan as cloud-init's user-data, on a disk of its NoCloud data source.

cloud-init's documentation: "NoCloud", "User-data formats", and the modules ``write_files``
and ``runcmd``.  Files are written in the first of cloud-init's stages that has the network,
``runcmd`` in the last one.  Both run once for each instance id.  JSON is YAML, too.
"""

from __future__ import annotations

import base64
import email
import email.message
import email.mime.multipart
import email.mime.text
import gzip
import json
from typing import TYPE_CHECKING, Any

from vmprovision.changes.conditions import digest
from vmprovision.changes.operations import (
    EditBlock,
    MakeDirectory,
    Symlink,
    WriteFile,
)
from vmprovision.errors import PlanError, UnsupportedGuestError
from vmprovision.initsystem import definition_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.changes.operations import Operation
    from vmprovision.guest.facts import InitVerdict

LABEL = "cidata"
UNNAMED = "nocloud"  # cloud-init's own id of an instance without one; no agent takes it for a name
# what of two documents' lists, such as runcmd, becomes one list
MERGED = "list(append)+dict(no_replace,recurse_list)+str()"
# where the guest has SELinux: links are made by a shell, which labels nothing
RELABEL = 'if command -v restorecon >/dev/null; then restorecon "$@"; fi'


def make_documents(
    operations: Sequence[Operation],
    init: InitVerdict,
    *,
    instance_id: str | None = None,
    user_data: bytes | None = None,
) -> dict[str, bytes]:
    """Return the files of a NoCloud seed, ``meta-data`` and ``user-data``.

    Args:
        operations: of the plan, in order.
        init: what runs services in the guest.
        instance_id: cloud-init applies the seed once for each.
        user_data: the caller's own, which is applied as well.

    Raises:
        UnsupportedGuestError: no service can be started by cloud-init under this init system.
        PlanError: the caller's own data is neither text nor MIME.
    """
    own = _cloud_config(operations, init, merged=user_data is not None)
    return {
        "meta-data": _as_json({"instance-id": instance_id or UNNAMED}),
        "user-data": own if user_data is None else _joined(user_data, own),
    }


def _cloud_config(operations: Sequence[Operation], init: InitVerdict, *, merged: bool) -> bytes:
    start = _start_commands(operations, init)
    config: dict[str, Any] = {"merge_how": MERGED} if merged else {}
    config["write_files"] = [_file(each) for each in operations if isinstance(each, WriteFile)]
    config["runcmd"] = [
        *(command for each in operations for command in _commands(each)),
        ["sh", "-c", RELABEL, "sh", *(str(each.path) for each in operations)],
        *start,
    ]
    return b"#cloud-config\n" + _as_json(config)


def _as_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode("ascii")


def _file(operation: WriteFile) -> dict[str, str]:
    packed = gzip.compress(operation.content, mtime=0)
    return {
        "path": str(operation.path),
        "owner": "root:root",
        "permissions": f"{operation.mode:04o}",
        "encoding": "gz+b64",
        "content": base64.b64encode(packed).decode("ascii"),
    }


def _commands(operation: Operation) -> list[list[str]]:
    """Return what does that of an operation which ``write_files`` cannot do."""
    if isinstance(operation, MakeDirectory):
        return [["mkdir", "-p", str(operation.path)]]
    if isinstance(operation, Symlink):
        folder = ["mkdir", "-p", str(operation.path.parent)]
        return [folder, ["ln", "-sfn", operation.target, str(operation.path)]]
    return []


def _start_commands(operations: Sequence[Operation], init: InitVerdict) -> list[list[str]]:
    """Return what starts the service now: the guest has booted as far as that without it.

    Raises:
        UnsupportedGuestError: it takes lines in a file that others fill, or nothing starts it.
    """
    definition = definition_of(str(init.system))
    usual = definition.variants[0]
    variant = next((v for v in definition.variants if v.dialect == init.dialect), usual)
    live = variant.live or usual.live
    # insserv's makefiles hold all services of a guest, and its update-rc.d makes them anew
    edits = definition.name != "sysv" and any(isinstance(o, EditBlock) for o in operations)
    if live is None or not live.start or edits:
        raise UnsupportedGuestError(
            f"cloud-init is not known to install services for {init.system}",
            hint="write to the image with `vmprovision inject`",
        )
    return [command.split() for command in live.start]


def _joined(user_data: bytes, own: bytes) -> bytes:
    """Return MIME multi-part user-data of the caller's documents and ours.

    Ours is the last, since it says how its lists are merged with those before it.
    """
    try:
        text = user_data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise PlanError(
            "the user-data to join is not text in UTF-8", hint="unpack it, if it is compressed"
        ) from exc
    given = email.message_from_bytes(user_data)
    parts: list[email.message.Message] = [_part(text)]
    if given.is_multipart():
        parts = [part for part in given.walk() if not part.is_multipart()]
    whole = email.mime.multipart.MIMEMultipart(boundary=digest(user_data + own))
    for part in (*parts, _part(own.decode("ascii"), "cloud-config")):
        whole.attach(part)
    return whole.as_bytes()


def _part(text: str, kind: str = "plain") -> email.message.Message:
    """Return one document; cloud-init finds out by its first line what a plain one is."""
    return email.mime.text.MIMEText(text, kind, "utf-8")
