"""What the kernel counts, read from /proc (proc(5)): for ``/metrics`` in both of its forms.

Absent files and lines that are not as expected give nothing. Kernels from 2.6 on.
"""

import os

from . import compat
from .files import read_lines, read_text

# Partitions of these are counted in their disks, and the others are no disks (node_exporter's
# choice as well).
_DISK_KINDS = ("hd", "sd", "vd", "xvd")
_NO_DISKS = ("ram", "loop", "fd")

# Only what cannot hang: statvfs on a network's file system waits for a server that may be gone.
_LOCAL = (
    "ext2 ext3 ext4 xfs btrfs bcachefs f2fs jfs nilfs2 reiserfs zfs ufs vfat msdos exfat ntfs ntfs3"
    " hfsplus ubifs jffs2 yaffs2 tmpfs"
).split()
# Neither local nor in the way: nothing below these can hang.
_HARMLESS = (
    "rootfs overlay aufs squashfs erofs iso9660 udf ramfs devtmpfs proc sysfs devpts cgroup cgroup2"
    " bpf debugfs tracefs securityfs configfs pstore efivarfs mqueue hugetlbfs fusectl binfmt_misc"
    " selinuxfs nsfs rpc_pipefs"
).split()
_KERNELS_OWN = ("/dev", "/proc", "/sys")
_OTHERS_OWN = ("/run/credentials/", "/var/lib/docker/", "/var/lib/containers/storage/")


def numbers(words):
    """Words as integers, or None if one of them is none."""
    try:
        return [int(word) for word in words]
    except ValueError:
        return None


def is_disk(name):
    """Whether a block device is a disk of its own, by its name."""
    stem = name.rstrip("0123456789")
    if stem == name:
        return True
    if stem in _NO_DISKS or (stem[:4] == "nvme" and stem[-1:] == "p"):
        return False
    return not [kind for kind in _DISK_KINDS if stem[: len(kind)] == kind]


def disks(proc):
    """Yields name and counters of every disk, as the kernel's iostats.rst numbers them."""
    for line in read_lines(proc + "/diskstats"):
        words = line.split()
        counters = numbers(words[3:])
        if counters and len(counters) > 10:
            name = compat.to_text(words[2])
            if is_disk(name):
                yield name, counters


def networks(proc):
    """Yields name and sixteen counters, those of receiving first, of every interface."""
    for line in read_lines(proc + "/net/dev"):
        # before Linux 2.6.39 a large counter stands right behind the colon
        name, colon, rest = line.rpartition(b":")
        counters = numbers(rest.split())
        if colon and counters and len(counters) > 15:
            yield compat.to_text(name).strip(), counters


def _unescape(word):
    """A word of a mount table, in which spaces stand as octal numbers."""
    parts = compat.to_text(word).split("\\")
    out = parts[:1]
    for part in parts[1:]:
        if len(part) > 2 and not part[:3].strip("01234567"):
            out.append(chr(int(part[:3], 8) & 127) + part[3:])
        else:
            out.append("\\" + part)
    return "".join(out)


def _all_mounts(proc):
    """Device, mount point, type and whether it is read-only, of all that is mounted but harmless.

    /proc/self/mountinfo (from Linux 2.6.26) tells the file system's own options; those in
    /proc/mounts are of the view that this service has, which systemd lets it only read.
    Of too many there are none: one that is not known of may be one that hangs.
    """
    found = []
    for name in ("/self/mountinfo", "/mounts"):
        for line in read_lines(proc + name):
            words = line.split()
            if b"-" in words[6:]:
                rest = words[words.index(b"-", 6) + 1 :]
                words = rest[1:2] + words[4:5] + rest[:1] + rest[2:3]
            if len(words) > 3 and compat.to_text(words[2]) not in _HARMLESS:
                texts = [_unescape(word) for word in words[:3]]
                found.append(texts + ["ro" in compat.to_text(words[3]).split(",")])
                if len(found) > compat.ROW_LIMIT:
                    return []
        if found:
            break
    return found


def _is_at(point, folder):
    return point == folder or point.startswith(folder.rstrip("/") + "/")


def file_systems(proc, root):
    """Yields device, mount point, type, read-only and statvfs(3), None if that fails.

    Local ones only, whose mount point can be reached without a network's file system, a FUSE
    program or an automounter.
    """
    mounts = _all_mounts(proc)
    risky = [each[1] for each in mounts if each[2] not in _LOCAL]
    seen = set()
    for device, point, kind, is_read_only in mounts:
        if kind not in _LOCAL or (device, point) in seen:
            continue
        if [folder for folder in risky + list(_KERNELS_OWN) if _is_at(point, folder)]:
            continue
        if [folder for folder in _OTHERS_OWN if point.startswith(folder)]:
            continue
        seen.add((device, point))
        try:
            figures = os.statvfs(root + point)
        except OSError:
            figures = None
        yield device, point, kind, is_read_only, figures


def pressure(proc, name):
    """Yields kind ("some", "full") and a dict of text for a resource (Linux 4.20 and later)."""
    for line in read_lines("%s/pressure/%s" % (proc, name)):
        words = compat.to_text(line).split()
        yield words[0], dict([word.split("=", 1) for word in words[1:] if "=" in word])


def os_release(root):
    """What os-release(5) says, by its keys in lower case; older systems' own files, else {}."""
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
