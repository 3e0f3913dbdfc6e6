"""The machine of the saved appliance, as options of QEMU.

QEMU refuses a state, or hangs, if the machine that loads it differs from the machine
that saved it. So both take their options from here.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vmprovision.appliance.drives import TELL_FAILURES
from vmprovision.appliance.handle import ATTENDANT, MONITOR
from vmprovision.appliance.wrapper import CHANNEL, restoring_script
from vmprovision.qemu.options import CLOCK, accelerator_options, socket_options

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.qemu.options import Accelerator

MEMORY_MB = 1280  # libguestfs's own size; unused memory takes no room
TRANSLATION_MB = 64  # QEMU's buffer for translated code: more takes memory and saves no time
PORTS = {"org.libguestfs.channel.0": CHANNEL, "org.vmprovision.attendant": ATTENDANT}
# The first disk is a medium in this drive: a third of the time of plugging in a disk.
SLOT, SLOT_SERIAL = "slot", "vmprovisionslot"
# Not on SCSI, so that guestfsd never takes the appliance's root for a guest's disk.
ROOT_DEVICE = {"driver": "virtio-blk-pci", "drive": "appliance", "id": "root", "addr": "0x1e"}
COMMAND_LINE = (
    "panic=1 console=ttyS0 edd=off no_timer_check printk.time=1 cgroup_disable=memory "
    f"usbcore.nousb cryptomgr.notests {CLOCK} 8250.nr_uarts=1 selinux=0 quiet TERM=xterm"
)
# libguestfs takes what a console says only while it waits for its daemon. A restored machine
# would stand still meanwhile, as soon as a few hundred bytes wait.
CONSOLE = "ringbuf,id=console,size=65536"
# The memory stays in its file and is not copied into the state.
IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}


def machine_options(accelerator: Accelerator) -> list[str]:
    """Return the machine without the parts that differ between saving and restoring.

    Those are the file of its memory, its disk, its serial port and its sockets.
    """
    options = [
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", "pc,graphics=off,hpet=off,memory-backend=ram"),
        *accelerator_options(
            accelerator, tcg=f"tcg,tb-size={TRANSLATION_MB}", processor="max,la57=off"
        ),
        *("-m", str(MEMORY_MB), "-rtc", "driftfix=slew"),
        *("-device", "virtio-scsi-pci,id=scsi"),
        *("-drive", f"if=none,id={SLOT}"),
        *("-device", ",".join(["scsi-hd", *_slot_properties()])),
        *("-device", "virtio-serial-pci"),
    ]
    for name, chardev in PORTS.items():
        options += ["-device", f"virtserialport,chardev={chardev},name={name}"]
    return [*options, "-mon", f"chardev={MONITOR},mode=control"]


def _slot_properties() -> list[str]:
    place = f"id={SLOT},drive={SLOT},bus=scsi.0,channel=0,scsi-id=0,lun=0"
    failures = (f"{name}={value}" for name, value in TELL_FAILURES.items())
    return [place, "removable=on", f"serial={SLOT_SERIAL}", *failures]


def memory_options(folder: str, *, share: bool) -> list[str]:
    """Return the memory: written to its file while saving, copied on write while restored."""
    backend = f"memory-backend-file,id=ram,size={MEMORY_MB}M,mem-path={folder}/ram"
    return ["-object", f"{backend},share={'on' if share else 'off'}"]


def root_options(file: str) -> list[str]:
    """Return the appliance's root; nothing in it needs to be safe on the host's disk.

    The machine that is saved gets it while it runs.
    """
    device = ",".join(f"{name}={value}" for name, value in ROOT_DEVICE.items())
    drive = f"file={file},id=appliance,cache=unsafe,if=none,format=qcow2"
    return ["-drive", drive, "-device", device]


def wrapper_script(qemu: Path, accelerator: Accelerator, binder: str) -> str:
    """Return the script of a saved appliance; see ``restoring_script``."""
    here, session = '"$here"', '"$session"'
    options = [
        *("-name", session, "-chardev", '"$channel"'),
        *socket_options(ATTENDANT, f"{session}/{ATTENDANT}"),
        *socket_options(MONITOR, f"{session}/{MONITOR}"),
        *(shlex.quote(word) for word in machine_options(accelerator)),
        *memory_options(here, share=False),
        *root_options(f"{here}/root.qcow2,snapshot=on"),
        *("-chardev", CONSOLE, "-serial", "chardev:console", "-incoming", "defer"),
    ]
    return restoring_script(qemu, accelerator, options, binder)
