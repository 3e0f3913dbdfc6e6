"""Read the kernel's counters from /proc (proc(5)), for both forms of ``/metrics``.

Missing files and unexpected lines give nothing. Kernels from 2.6 on are supported.
"""

import os

from . import compat
from .files import read_lines, read_text

_MOST = 1 << 64  # larger than the kernel's counters
# Partitions of these are counted in their disks; other devices are not disks (as in
# node_exporter).
_DISK_KINDS = ("hd", "sd", "vd", "xvd", "dasd", "ubd")
_NO_DISKS = ("ram", "zram", "loop", "fd")

# Only types that cannot hang: statvfs on a network file system may wait for a lost server.
_LOCAL = (
    "ext2 ext3 ext4 xfs btrfs bcachefs f2fs jfs nilfs2 reiserfs zfs ufs vfat msdos exfat ntfs ntfs3"
    " hfsplus ubifs jffs2 yaffs2 tmpfs"
).split()
# Not local disks, but harmless: nothing below these can hang.
_HARMLESS = (
    "rootfs overlay aufs squashfs erofs iso9660 udf ramfs devtmpfs proc sysfs devpts cgroup cgroup2"
    " bpf debugfs tracefs securityfs configfs pstore efivarfs mqueue hugetlbfs fusectl binfmt_misc"
    " selinuxfs nsfs rpc_pipefs"
).split()
_KERNELS_OWN = [b"/dev", b"/proc", b"/sys"]
_OTHERS_OWN = (b"/run/credentials/", b"/var/lib/docker/", b"/var/lib/containers/storage/")
# What systemd shows its services in place of what is there (PrivateTmp=, InaccessiblePaths=),
# by the part of a file system that it is; and what is empty for services only (DynamicUser=,
# LoadCredential=).
_SANDBOX_ROOTS = (b"/systemd-private-", b"/systemd/inaccessible/", b"/systemd/propagate/")
_SANDBOX_POINTS = (b"/run/private", b"/run/credentials")


def numbers(words):
    """Return words as integers, or None if one of them is not a number of the kernel's."""
    try:
        found = [int(word) for word in words]
    except ValueError:
        return None
    return None if found and (max(found) >= _MOST or min(found) <= -_MOST) else found


def is_disk(name):
    """Return whether a block device is a whole disk, by its name.

    The kernel appends a partition's number to a name that ends with a letter, and ``p``
    and the number to one that ends with a digit.
    """
    stem = name.rstrip("0123456789")
    if stem == name:
        return True
    if stem in _NO_DISKS or (stem[-1:] == "p" and compat.is_digits(stem[-2:-1])):
        return False
    if stem[:4] == "nvme" and "c" in stem:  # one of several paths to a disk
        return False
    return not [kind for kind in _DISK_KINDS if stem[: len(kind)] == kind]


def disks(proc):
    """Yield name and counters of every disk, as the kernel's iostats.rst numbers them."""
    for line in read_lines(proc + "/diskstats"):
        words = line.split()
        counters = numbers(words[3:])
        if counters and len(counters) > 10:
            name = compat.to_text(words[2])
            if is_disk(name):
                yield name, counters


def networks(proc):
    """Yield name and sixteen counters of every interface, received ones first."""
    for line in read_lines(proc + "/net/dev"):
        # before Linux 2.6.39 a large counter follows the colon without a space
        name, colon, rest = line.rpartition(b":")
        counters = numbers(rest.split())
        if colon and counters and len(counters) > 15:
            yield compat.to_text(name).strip(), counters


def _unescape(word):
    """Return a word of a mount table with its octal numbers decoded."""
    parts = word.split(b"\\")
    out = parts[:1]
    for part in parts[1:]:
        if len(part) > 2 and not part[:3].strip(b"01234567"):
            code = int(compat.to_text(part[:3]), 8) & 255
            out.append(bytes(bytearray([code])) + part[3:])
        else:
            out.append(b"\\" + part)
    return b"".join(out)


class _Mount(object):
    """A line of a mount table; text stays bytes here, because it may not be UTF-8."""

    def __init__(self, source, point, kind, options, place):
        self.source = _unescape(source)
        self.point = _unescape(point)
        self.kind = compat.to_text(kind)
        self.is_read_only = b"ro" in options.split(b",")
        # Its own number, its parent's, the device, and the root of the mount on the device.
        self.number, self.parent, self.device, self.root = place


def _all_mounts(proc):
    """Return the mounts that may hang or are measured, and harmless mounts that cover those.

    /proc/self/mountinfo (from Linux 2.6.26) has the file system's own options. Those in
    /proc/mounts are of this service's view, which systemd may make read-only. If there
    are too many mounts, return none: an unknown one may be one that hangs.
    """
    found = []
    for name in ("/self/mountinfo", "/mounts"):
        points = set()
        for line in read_lines(proc + name):
            words, place = line.split(b" "), [None] * 4  # a source may be empty
            if b"-" in words[6:]:
                place = words[:4]
                rest = words[words.index(b"-", 6) + 1 :]
                words = rest[1:2] + words[4:5] + rest[:1] + rest[2:3]
            if len(words) > 3:
                if words[1] in points or compat.to_text(words[2]) not in _HARMLESS:
                    points.add(words[1])
                    found.append(_Mount(words[0], words[1], words[2], words[3], place))
                    if len(found) > compat.ROW_LIMIT:
                        return []
        if found:
            break
    return found


def _is_at(point, folder):
    return point == folder or point.startswith(folder.rstrip(b"/") + b"/")


def _is_sandbox(mount, mounts):
    """Return whether only one service sees a mount, or the same files are there without it.

    systemd mounts folders onto themselves that a service may only read, or alone may
    write to.
    """
    if mount.point in _SANDBOX_POINTS:
        return True
    if mount.root in (None, b"/"):
        return False
    if [mark for mark in _SANDBOX_ROOTS if mark in mount.root]:
        return True
    for each in mounts:
        if each.device == mount.device and _is_at(mount.point, each.point):
            beyond = mount.point[len(each.point.rstrip(b"/")) :]
            if each is not mount and each.root.rstrip(b"/") + beyond == mount.root:
                return True
    return False


def _is_covered(mount, mounts):
    """Return whether its mount point leads to another device that was mounted there later."""
    top = mount
    for _ in mounts:
        upper = [
            each
            for each in mounts
            if each.parent and each.parent == top.number and each.point == mount.point
        ]
        if not upper:
            break
        top = upper[-1]
    return top.device != mount.device


def file_systems(proc, root):
    """Yield device, mount point, type, read-only and statvfs(3), None if that fails.

    Only local file systems, as the guest and not a sandbox sees them, whose mount point
    can be reached without a network file system, a FUSE program or an automounter.
    """
    mounts = _all_mounts(proc)
    risky = [each.point for each in mounts if each.kind not in _LOCAL + _HARMLESS]
    seen = set()
    for mount in mounts:
        point = mount.point
        if mount.kind not in _LOCAL or (mount.source, point) in seen:
            continue
        if [folder for folder in risky + _KERNELS_OWN if _is_at(point, folder)]:
            continue
        if [folder for folder in _OTHERS_OWN if point.startswith(folder)]:
            continue
        if _is_sandbox(mount, mounts) or _is_covered(mount, mounts):
            continue
        seen.add((mount.source, point))
        try:
            figures = os.statvfs(compat.to_bytes(compat.to_path(root)) + point)
        except (OSError, ValueError, TypeError):  # for a NUL in the path
            figures = None
        names = compat.to_text(mount.source), compat.to_text(point)
        yield names + (mount.kind, mount.is_read_only, figures)


def pressure(proc, name):
    """Yield kind ("some", "full") and a dict of text for a resource (Linux 4.20 and later)."""
    for line in read_lines("%s/pressure/%s" % (proc, name)):
        words = compat.to_text(line).split()
        pairs = dict([word.split("=", 1) for word in words[1:] if "=" in word])
        if compat.is_digits(pairs.get("total", "")):
            yield words[0], pairs


def os_release(root):
    """Return os-release(5) by its keys in lower case, or an older system's equivalent, else {}."""
    values = {}
    for name in ("/etc/os-release", "/usr/lib/os-release"):
        for line in read_lines(root + name, 16384):
            key, equals, value = compat.to_text(line).strip().partition("=")
            if equals and key[:1] != "#":
                values[key.lower()] = value.strip("'\"")
        if values:
            return values
    for kind in ("redhat", "SuSE", "alpine", "slackware", "gentoo", "arch"):
        text = read_text("%s/etc/%s-release" % (root, kind), 1024)
        text = text or read_text("%s/etc/%s-version" % (root, kind), 1024)
        if text:
            return {"id": kind.lower(), "pretty_name": text.split("\n")[0]}
    version = read_text(root + "/etc/debian_version", 1024)
    return {"id": "debian", "version_id": version} if version else {}
