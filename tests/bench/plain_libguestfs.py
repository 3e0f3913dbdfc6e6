"""The edit with libguestfs's own binding, inspection included: ``plain_libguestfs.py IMAGE LIST``.

It follows the binding's documentation: ``inspect_os``, mount what that found, one call
after the other.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(image: str, manifest: str) -> None:
    """Make the edit."""
    handle = importlib.import_module("guestfs").GuestFS(python_return_dict=True)
    handle.add_drive_opts(image, format="qcow2", readonly=False)
    handle.launch()
    (root,) = handle.inspect_os()
    mountpoints = handle.inspect_get_mountpoints(root)
    for mountpoint in sorted(mountpoints, key=len):
        handle.mount(mountpoints[mountpoint], mountpoint)
    for each in json.loads(Path(manifest).read_text()):
        if each["kind"] == "directory":
            handle.mkdir_p(each["path"])
        elif each["kind"] == "file":
            handle.upload(each["source"], each["path"])
            handle.chmod(each["mode"], each["path"])
        else:
            handle.ln_sf(each["target"], each["path"])
    handle.umount_all()
    handle.shutdown()
    handle.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
