"""The operations of a plan as cloud-init's user-data, on a disk for its NoCloud data source.

cloud-init's documentation: "NoCloud", "User-data formats", and the modules
``write_files`` and ``runcmd``. cloud-init writes files in its first stage with a
network, and runs ``runcmd`` in its last stage. Both happen once for each instance ID.
The documents are JSON, which is also YAML.
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
UNNAMED = "nocloud"  # cloud-init's own default ID; the agent does not take it for a name
# merge the lists of two documents, such as runcmd, into one
MERGED = "list(append)+dict(no_replace,recurse_list)+str()"
# for guests with SELinux: a shell makes the links, and labels nothing
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
        operations: the plan's operations, in order.
        init: the guest's init system.
        instance_id: cloud-init applies the seed once for each ID.
        user_data: the caller's own document, which cloud-init applies too.

    Raises:
        UnsupportedGuestError: cloud-init cannot start the service under this init system.
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
    """Return the commands for the part of an operation that ``write_files`` cannot do."""
    if isinstance(operation, MakeDirectory):
        return [["mkdir", "-p", str(operation.path)]]
    if isinstance(operation, Symlink):
        folder = ["mkdir", "-p", str(operation.path.parent)]
        return [folder, ["ln", "-sfn", operation.target, str(operation.path)]]
    return []


def _start_commands(operations: Sequence[Operation], init: InitVerdict) -> list[list[str]]:
    """Return the commands that start the service now, because the guest has booted without it.

    Raises:
        UnsupportedGuestError: the service needs lines in a shared file, or cannot be started.
    """
    definition = definition_of(str(init.system))
    usual = definition.variants[0]
    variant = next((v for v in definition.variants if v.dialect == init.dialect), usual)
    live = variant.live or usual.live
    # insserv's makefiles list all services of a guest, and its update-rc.d rewrites them
    edits = definition.name != "sysv" and any(isinstance(o, EditBlock) for o in operations)
    if live is None or not live.start or edits:
        raise UnsupportedGuestError(
            f"cloud-init is not known to install services for {init.system}",
            hint="write to the image with `vmprovision inject`",
        )
    return [command.split() for command in live.start]


def _joined(user_data: bytes, own: bytes) -> bytes:
    """Return MIME multi-part user-data of the caller's documents and the agent's.

    The agent's document is the last, because it states how its lists are merged with
    earlier ones.
    """
    try:
        text = user_data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise PlanError(
            "the user-data to join is not text in UTF-8", hint="decompress it, if it is compressed"
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
    """Return one document; cloud-init recognises a plain one by its first line."""
    return email.mime.text.MIMEText(text, kind, "utf-8")
