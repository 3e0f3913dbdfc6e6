"""Find out which machine this is, because one injected image may serve many machines.

A setting that the configuration lacks is searched outside the image, under the same
name everywhere, ``guest_agent.vm_id`` and ``guest_agent.manager_url``: on the kernel's
command line, in SMBIOS (OEM Strings, type 11 of DSP0134), among systemd's credentials
(systemd.exec(5)) and in QEMU's fw_cfg (below ``opt/``). A machine without a name there
gets cloud-init's instance ID, else its SMBIOS UUID. The operator of the machine sets
these; they may be any text.
"""

import os

from . import compat, config
from .files import READ_LIMIT, read_bounded, read_pieces

PREFIX = "guest_agent."
HANDOVER = "/run/guest-agent.identity"
VARIABLE = "GUEST_AGENT_"  # prefix of the names in it
_PROTECTED = ("SMBIOS_VM_ID", "SMBIOS_MANAGER_URL", "FW_CFG_VM_ID", "FW_CFG_MANAGER_URL", "UUID")
_PARTS = (("VM_ID", "vm_id", config.parse_vm_id), ("MANAGER_URL", "manager", config.parse_url))

_TABLES_LIMIT = 1 << 22

# cloud-init's names for machines without one.
_SHARED_NAMES = ("nocloud", "iid-local01", "iid-datasource", "iid-datasource-none")
# Vendors' placeholders for a UUID.
_SHARED_UUIDS = ("03000200-0400-0500-0006-000700080009", "00020003-0004-0005-0006-000700080009")


def oem_strings(path):
    """Return the strings of every OEM Strings structure in a file of SMBIOS tables, as bytes.

    A guest with much memory has far more than 64 KiB of tables, so each structure is skipped
    as soon as it is complete.
    """
    found = []
    rest = b""
    for piece in read_pieces(path, _TABLES_LIMIT, compat.READ_SIZE):
        rest += piece
        while len(rest) >= 4:
            kind, length = bytearray(rest[:2])
            if length < 4 or kind == 127:  # the end marker; stale data may follow
                return found
            end = rest.find(b"\0\0", length)
            if end < 0:
                break
            if kind == 11:
                found += rest[length:end].split(b"\0")
            rest = rest[end + 2 :]
        if len(rest) > READ_LIMIT:  # no structure is so long
            break
    return found


def split_parameters(line):
    """Return the parameters of a kernel command line; double quotes keep spaces in a parameter.

    By the kernel's own rules (kernel-parameters.rst), a quote may be anywhere in a
    parameter. Quotes around a whole parameter are removed.
    """
    found = [b""]
    for place, part in enumerate(line.split(b'"')):
        if place % 2:
            found[-1] += b'"' + part + b'"'
            continue
        words = part.replace(b"\t", b" ").replace(b"\n", b" ").split(b" ")
        found[-1] += words[0]
        found += words[1:]
    return [word[1:-1] if word[:1] == word[-1:] == b'"' else word for word in found]


def pick(words, key):
    """Return the value of the last ``guest_agent.KEY=VALUE`` among some words, or None.

    In a name - and _ are equal, as in the kernel; quotes around a value are removed.
    """
    value = None
    for word in words:
        name, equals, text = word.partition(b"=")
        if equals and name.replace(b"-", b"_") == compat.to_bytes(PREFIX + key.lower()):
            value = text.strip(b'"')
    return value


def parse_uuid(text):
    """Return a system UUID in lower case, or None if other machines may have the same one."""
    uuid = text.strip().lower()
    digits = uuid.replace("-", "")
    if len(uuid) != 36 or len(digits) != 32 or digits.strip("0123456789abcdef"):
        return None
    # All zeros, all ones, 12345678-1234-...: no real UUID has so few different digits.
    return None if len(set(digits)) < 4 or uuid in _SHARED_UUIDS else uuid


def read_protected(root):
    """Return the facts that only root may read, as bytes by the names in ``_PROTECTED``."""
    found = {}
    firmware = root + "/sys/firmware/"
    words = oem_strings(firmware + "dmi/tables/DMI")
    for number in [] if words else range(4):
        words += oem_strings(firmware + "dmi/entries/11-%d/raw" % number)
    for key in ("VM_ID", "MANAGER_URL"):
        found["SMBIOS_" + key] = pick(words, key)
        path = firmware + "qemu_fw_cfg/by_name/opt/" + PREFIX + key.lower() + "/raw"
        found["FW_CFG_" + key] = read_bounded(path, 2048).strip(b"\0\n ")
    uuid = read_bounded(root + "/sys/class/dmi/id/product_uuid", 64)
    found["UUID"] = parse_uuid(compat.to_text(uuid))
    for name in [name for name in found if not found[name]]:
        del found[name]
    return found


def hand_over(root, path):
    """Write the facts that only root may read to a systemd EnvironmentFile= for the agent's user.

    It contains the configuration file at ``path``, so from its creation on only root
    may read it. Raises OSError (IOError on Python 2).
    """
    lines = config.hand_over(path)
    for name, value in sorted(read_protected(root).items()):
        try:
            lines.append("%s%s='%s'\n" % (VARIABLE, name, config.parse_outside(value)))
        except ValueError:
            pass  # the agent could not use this value either
    former = os.umask(0o077)
    try:
        if compat.exists(root + HANDOVER):
            os.remove(root + HANDOVER)
        target = open(root + HANDOVER, "wb")
    finally:
        os.umask(former)
    try:
        target.write(compat.to_bytes("".join(lines)))
    finally:
        target.close()


class Identity(object):
    """Complete settings from facts about this machine; made while the agent is still root."""

    def __init__(self, root, proc, log):
        self._root = root
        self._proc = proc
        self._log = log
        self._protected = read_protected(root)
        for name in _PROTECTED:
            self._protected.setdefault(name, compat.getenv(VARIABLE + name))

    def complete(self, settings):
        """Set what the configuration lacks, each value from the first source that has it."""
        for key, name, parse in _PARTS:
            if settings.identity[key.lower()]["source"] == config.SOURCE:
                continue
            for source, value in self._candidates(key):
                try:
                    if not value:
                        continue
                    text = config.parse_outside(value)
                    parsed = parse(text)
                except ValueError as error:
                    text = "%s from %s %s: ignored" % (key, source, error.args[0])
                    self._log.changed(key + source, text, self._log.warning)
                    continue
                setattr(settings, name, parsed)
                settings.identity[key.lower()] = {"value": text, "source": source}
                self._log.changed(key, "%s is %s, from %s" % (key, text, source))
                break

    def _candidates(self, key):
        line = read_bounded(self._proc + "/cmdline", 8192)
        yield "kernel command line", pick(split_parameters(line), key)
        yield "SMBIOS OEM string", self._protected["SMBIOS_" + key]
        directory = compat.getenv("CREDENTIALS_DIRECTORY")
        if directory:
            path = "%s/%s%s" % (directory, PREFIX, key.lower())
            yield "systemd credential", read_bounded(path, 2048).strip()
        yield "fw_cfg", self._protected["FW_CFG_" + key]
        if key == "VM_ID":
            yield "cloud-init", self._instance()
            if not self._is_being_named():
                yield "SMBIOS UUID", self._protected["UUID"]

    def _instance(self):
        # Not /var/lib/cloud: an ID captured in an image would name every clone.
        name = read_bounded(self._root + "/run/cloud-init/.instance-id", 256).strip()
        return None if compat.to_text(name) in _SHARED_NAMES else name

    def _is_being_named(self):
        """Return whether cloud-init is still running, so that the machine may yet get a name."""
        run = self._root + "/run/cloud-init/"
        return compat.exists(run + "enabled") and not compat.exists(run + "result.json")
