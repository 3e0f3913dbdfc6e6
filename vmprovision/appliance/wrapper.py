"""The shell scripts that libguestfs starts in place of QEMU.

If libguestfs asks for QEMU's features, a script runs QEMU itself. Otherwise it restores
the saved appliance or boots libguestfs's own. In both cases the kernel ends QEMU when the thread
that started it ends, and the session's folder names the folder of libguestfs's socket.
"""

from __future__ import annotations

import functools
import shlex
import shutil
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError
from vmprovision.host.command import run
from vmprovision.host.workspace import ELSEWHERE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmprovision.qemu.options import Accelerator

CHANNEL = "channel0"  # libguestfs's name for the way to its daemon
TRY_SECONDS = 10.0

# Take libguestfs's channel, and our session's folder, from the options. QEMU's temporary files
# belong in that folder too: a killed QEMU leaves the file of its snapshot.
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
    export TMPDIR="$session"
fi
"""
# Remove KVM from the accelerators that libguestfs names. It asks QEMU what it can do on KVM
# even to use TCG, and would wait for ever for a KVM that hangs.
WITHOUT_KVM = """\
for word; do
    shift
    case $word in
    *accel=kvm:*) word=${word%%accel=kvm:*}accel=${word#*accel=kvm:} ;;
    esac
    set -- "$@" "$word"
done
"""


@functools.cache
def find_binder() -> str:
    """Return the words that let a command end with the thread that starts it; "" without any.

    prctl(2), PR_SET_PDEATHSIG, counts the death of the parent's thread, not its process.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return ""
    bound = [setpriv, "--pdeathsig", "KILL"]
    try:
        run([*bound, "true"], timeout=TRY_SECONDS)
    except CommandError:  # an older util-linux, or BusyBox's
        return ""
    return shlex.join([*bound, "--"])


def restoring_script(
    qemu: Path, accelerator: Accelerator, options: Sequence[str], binder: str
) -> str:
    """Return the script that restores the saved appliance in the script's own folder.

    Args:
        qemu: the QEMU program.
        accelerator: what the appliance runs on.
        options: QEMU's, quoted for a shell, in which ``$here`` is the folder,
            ``$session`` the session's and ``$channel`` libguestfs's channel.
        binder: from ``find_binder``.
    """
    return f"""\
#!/bin/sh
# Restores a saved appliance of vmprovision; libguestfs starts this in place of QEMU.
qemu={shlex.quote(str(qemu))}
here=${{0%/*}}
{FIND_SESSION}if [ -z "$channel" ]; then
{_without_kvm(accelerator)}exec "$qemu" "$@"
fi
exec {binder} "$qemu" {" ".join(options)}
"""


def booting_script(qemu: Path, accelerator: Accelerator, binder: str) -> str:
    """Return the script that runs QEMU with libguestfs's own options.

    libguestfs has a process that ends QEMU when ours is killed. It does not help if that
    process is killed as well, as with a whole process group.

    Args:
        qemu: the QEMU program.
        accelerator: what the appliance runs on.
        binder: from ``find_binder``.
    """
    return f"""\
#!/bin/sh
# Boots libguestfs's appliance; libguestfs starts this in place of QEMU.
{FIND_SESSION}{_without_kvm(accelerator)}exec {binder} {shlex.quote(str(qemu))} "$@"
"""


def _without_kvm(accelerator: Accelerator) -> str:
    return "" if accelerator == "kvm" else WITHOUT_KVM
