"""Find links among the directories that a plan uses, and the guest's kernels."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import follow, status_of
from vmprovision.guest.facts import Kernel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.filesystem.protocol import GuestReader

# Every directory that a plan may write to.
DIRECTORIES = (
    "/etc",
    "/etc/dinit.d",
    "/etc/dinit.d/boot.d",
    "/etc/finit.d",
    "/etc/finit.d/available",
    "/etc/finit.d/enabled",
    "/etc/init",
    "/etc/init.d",
    "/etc/init.d/rc3.d",
    "/etc/init.d/rc5.d",
    "/etc/rc.d",
    "/etc/rc.d/init.d",
    *(f"/etc/rc.d/rc{level}.d" for level in range(7)),
    *(f"/etc/rc{level}.d" for level in range(7)),
    "/etc/runit",
    "/etc/runit/runsvdir",
    "/etc/runit/runsvdir/default",
    "/etc/runit/sv",
    "/etc/runlevels",
    "/etc/runlevels/default",
    "/etc/sv",
    "/etc/systemd",
    "/etc/systemd/system",
    "/etc/systemd/system/multi-user.target.wants",
    "/etc/systemd/system-preset",
    "/usr",
    "/usr/local",
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/local/lib/guest-agent",
    "/var",
    "/var/log",
)

_KERNEL = re.compile(r"(?:vmlinuz|vmlinux|bzImage|Image|kernel)(?:[-.](?P<version>.+))?$")
_INITRDS = ("initrd.img-{0}", "initramfs-{0}.img", "initrd-{0}", "initramfs-{0}", "initrd-{0}.img")
KERNEL_LIMIT = 200
_BARE_INITRDS = ("initrd.img", "initrd", "initramfs", "initramfs.img", "rootfs.cpio.gz")


def find_links(reader: GuestReader, *more: PurePosixPath) -> Mapping[PurePosixPath, PurePosixPath]:
    """Return the real paths of those directories that are links or are below links.

    A directory behind a circle of links is left out.
    """
    found = {}
    for path in (*(PurePosixPath(name) for name in DIRECTORIES), *more):
        real = follow(reader, path)
        if real is not None and real != path:
            found[path] = real
    return found


def find_circles(reader: GuestReader) -> frozenset[PurePosixPath]:
    """Return those of the directories that are behind a circle of links."""
    paths = map(PurePosixPath, DIRECTORIES)
    return frozenset(path for path in paths if follow(reader, path) is None)


def find_kernels(reader: GuestReader) -> tuple[Kernel, ...]:
    """Return the kernels in ``/boot``, newest first, each with its initrd."""
    boot = PurePosixPath("/boot")
    names = set(reader.list_directory(boot))
    candidates = sorted(name for name in names if _KERNEL.match(name))
    kernels = []
    for name in candidates[:KERNEL_LIMIT]:
        match = _KERNEL.match(name)
        status = status_of(reader, boot / name) if match else None
        if not match or status is None or status.kind != "file" or name.endswith((".old", ".hmac")):
            continue
        version = match["version"] or ""
        wanted = [form.format(version) for form in _INITRDS] if version else list(_BARE_INITRDS)
        initrd = next((boot / entry for entry in wanted if entry in names), None)
        kernels.append(Kernel(path=boot / name, initrd=initrd, version=version))
    rescue = [kernel for kernel in kernels if "rescue" in kernel.version]
    usual = [kernel for kernel in kernels if kernel not in rescue]
    return tuple(sorted(usual, key=_kernel_order, reverse=True)) + tuple(rescue)


def _kernel_order(kernel: Kernel) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"\d+|[a-z]+", kernel.version)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], kernel.version
