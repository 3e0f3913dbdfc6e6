"""ISO 9660 images (ECMA-119) with Linux file names: Rock Ridge and Joliet."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pycdlib

if TYPE_CHECKING:
    from collections.abc import Mapping


def make_iso(label: str, files: Mapping[str, bytes]) -> bytes:
    """Return an ISO 9660 image with these files in its root directory.

    Args:
        label: the volume's label.
        files: each file's name with its content.
    """
    image = pycdlib.PyCdlib()
    # level 3 allows the longest names; plain ECMA-119 names are ignored if there are others
    image.new(interchange_level=3, vol_ident=label, joliet=3, rock_ridge="1.09")
    contents = [io.BytesIO(content) for content in files.values()]
    for number, (name, content) in enumerate(zip(files, contents, strict=True)):
        image.add_fp(
            content,
            len(content.getvalue()),
            iso_path=f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    written = io.BytesIO()
    image.write_fp(written)
    image.close()
    return written.getvalue()
