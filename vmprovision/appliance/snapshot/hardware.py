"""The machine of the saved appliance: QEMU's options, and the program that restores it.

Whatever is not the same when it is saved and when it is restored, QEMU refuses,
or hangs over; so the options stand here, once.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vmprovision.host.workspace import ELSEWHERE

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.qemu.accelerator import Accelerator

MEMORY_MB = 1280  # as libguestfs has it; what is not used takes no room
TRANSLATION_MB = 64  # QEMU's buffer for translated code: more takes memory and saves no time
CHANNEL = "channel0"  # libguestfs's name for the way to its daemon
ATTENDANT = "attendant"
MONITOR = "monitor"
PORTS = {"org.libguestfs.channel.0": CHANNEL, "org.vmprovision.attendant": ATTENDANT}
COMMAND_LINE = (
    "panic=1 console=ttyS0 edd=off no_timer_check printk.time=1 cgroup_disable=memory "
    "usbcore.nousb cryptomgr.notests tsc=reliable 8250.nr_uarts=1 selinux=0 quiet TERM=xterm "
    "root=/dev/vda"
)
# The memory stays in its file and is not copied into the state.
SPECIAL = frozenset(',"\\$`\n')  # in a path that stands in an option or in a shell script
IGNORE_SHARED = {"capability": "x-ignore-shared", "state": True}
# prctl(2), PR_SET_PDEATHSIG: it is the death of the parent's *thread* that counts
END_WITH_PARENT = """\
bound=
setpriv --pdeathsig KILL true 2>/dev/null && bound='setpriv --pdeathsig KILL --'"""

# libguestfs's channel and our session's folder, which is told where the channel's folder is
FIND_SESSION = f"""\
channel= session= last=
for word; do
    case $last,$word in
    -chardev,socket,*id={CHANNEL}) channel=$word ;;
    -name,*) session=$word ;;
    esac
    last=$word
done
if [ -n "$channel" ] && [ -d "$session" ]; then
    made=${{channel#*path=}}
    made=${{made%%,*}}
    printf '%s\\n' "${{made%/*}}" >"$session/{ELSEWHERE}"
fi
"""
# of the accelerators that libguestfs names, the next one
WITHOUT_KVM = """\
for word; do
    shift
    case $word in
    *accel=kvm:*) word=${word%%accel=kvm:*}accel=${word#*accel=kvm:} ;;
    esac
    set -- "$@" "$word"
done
"""


def machine_options(accelerator: Accelerator) -> list[str]:
    """The machine without what differs: its memory's file, disk, serial port and sockets."""
    is_kvm = accelerator == "kvm"
    speed = "kvm" if is_kvm else f"tcg,tb-size={TRANSLATION_MB}"
    options = [
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", "pc,graphics=off,hpet=off,memory-backend=ram", "-accel", speed),
        *("-cpu", "host" if is_kvm else "max,la57=off", "-m", str(MEMORY_MB)),
        *("-rtc", "driftfix=slew"),
        *("-object", "rng-random,filename=/dev/urandom,id=rng0"),
        *("-device", "virtio-rng-pci,rng=rng0"),
        *("-device", "virtio-scsi-pci,id=scsi"),
        # not on SCSI, so that guestfsd can never take the appliance's root for a guest's disk
        *("-device", "virtio-blk-pci,drive=appliance,addr=0x1e"),
        *("-device", "virtio-serial-pci"),
    ]
    for name, chardev in PORTS.items():
        options += ["-device", f"virtserialport,chardev={chardev},name={name}"]
    return [*options, "-mon", f"chardev={MONITOR},mode=control"]


def memory_options(folder: str, *, share: bool) -> list[str]:
    """The memory: in the file while the machine is saved, on top of it where it is restored."""
    backend = f"memory-backend-file,id=ram,size={MEMORY_MB}M,mem-path={folder}/ram"
    return ["-object", f"{backend},share={'on' if share else 'off'}"]


def root_options(file: str) -> list[str]:
    """The appliance's root; nothing in it needs to be safe on the host's disk."""
    return ["-drive", f"file={file},id=appliance,cache=unsafe,if=none,format=qcow2"]


def socket_options(name: str, path: Path | str) -> list[str]:
    """A character device that connects to a Unix socket of ours."""
    return ["-chardev", f"socket,id={name},path={path}"]


def wrapper_script(qemu: Path, accelerator: Accelerator) -> str:
    """What libguestfs starts in place of QEMU.

    Asked what it can do, QEMU answers; told to run, it restores the appliance that
    stands in the script's own folder.  Of libguestfs's options it takes the channel
    to its daemon, and the session's folder, which stands behind ``-name``.
    """
    here, session = '"$here"', '"$session"'
    options = [
        *("-name", session, "-chardev", '"$channel"'),
        *socket_options(ATTENDANT, f"{session}/{ATTENDANT}"),
        *socket_options(MONITOR, f"{session}/{MONITOR}"),
        *(shlex.quote(word) for word in machine_options(accelerator)),
        *memory_options(here, share=False),
        *root_options(f"{here}/root.qcow2,snapshot=on"),
        *("-serial", "stdio", "-incoming", "defer"),
    ]
    return f"""\
#!/bin/sh
# Restores a saved appliance of vmprovision; libguestfs starts this in place of QEMU.
qemu={shlex.quote(str(qemu))}
here=${{0%/*}}
{FIND_SESSION}if [ -z "$channel" ]; then
{_without_kvm(accelerator)}exec "$qemu" "$@"
fi
{END_WITH_PARENT}
exec $bound "$qemu" {" ".join(options)}
"""


def bound_script(qemu: Path, accelerator: Accelerator) -> str:
    """What libguestfs starts in place of QEMU where it boots its own appliance.

    libguestfs has a process that ends QEMU when ours is killed; it does not help
    where that is killed as well, as with a whole process group.

    """
    return f"""\
#!/bin/sh
# QEMU, ended by the kernel when the thread that has started it ends.
{FIND_SESSION}{_without_kvm(accelerator)}{END_WITH_PARENT}
exec $bound {shlex.quote(str(qemu))} "$@"
"""


def _without_kvm(accelerator: Accelerator) -> str:
    """What keeps QEMU off KVM where that is not to be used.

    libguestfs asks QEMU what it can do on KVM all the same, and would wait for a KVM that
    hangs for ever.
    """
    return "" if accelerator == "kvm" else WITHOUT_KVM
