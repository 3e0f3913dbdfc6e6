"""A QEMU in which only KVM is broken, to test such a host anywhere.

It is the real QEMU, with TCG in place of KVM.  ``pytest --kvm hangs`` runs the whole
suite on such a host.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from tests import stalled
from tests.conftest import require
from vmprovision.host.cache import write_atomically

NAME = "qemu-system-x86_64"
# Let the monitor of a machine that loads a state go through tests/stalled.py.
STALL = """\
case " $* " in
*" -incoming "*)
    path=
    for word; do
        shift
        case $word in
        socket,id=monitor,path=*)
            path=${{word#*path=}}
            word=socket,id=monitor,path=$path.stalled
            ;;
        esac
        set -- "$@" "$word"
    done
    {stalled} "$path.stalled" "$path" </dev/null >/dev/null 2>&1 &
    until [ -S "$path.stalled" ]; do sleep 0.01; done
    ;;
esac"""
# What the wrapper does if it is asked for KVM.
BEHAVIOURS = {
    "works": "",
    "fails": 'echo "qemu: failed to set MSR 0x10a" >&2; exit 1',
    "hangs": 'set -- "$@" -S',
    "prints": "printf 'SeaBIOS\\r\\nBooting from ROM..\\r\\n'; exec sleep 600",
    "stalls": STALL.format(stalled=shlex.join([sys.executable, str(Path(stalled.__file__))])),
}
WRAPPER = """\
#!/bin/sh
# QEMU whose KVM {behaviour}; for vmprovision's tests.
asked=
for word; do
    shift
    case $word in
    kvm) word=tcg asked=kvm ;;
    *accel=kvm*) word=${{word%%accel=kvm*}}accel=tcg asked=kvm ;;
    host) word=max ;;
    esac
    set -- "$@" "$word"
done
if [ "$asked" ] && [ ! -e {switch} ]; then
    {action}
    :
fi
exec {qemu} "$@"
"""


def broken_qemu(folder: Path, behaviour: str) -> Path:
    """Return a QEMU in a folder whose KVM behaves so, but works while the folder has ``mended``.

    A wrapper that exists is not written again: what is saved with it depends on its age.
    """
    real = shutil.which(NAME)
    require(real, f"{NAME} is not installed")
    path = folder / NAME
    content = WRAPPER.format(
        behaviour=behaviour,
        action=BEHAVIOURS[behaviour],
        switch=shlex.quote(str(folder / "mended")),
        qemu=shlex.quote(str(real)),
    ).encode()
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
        path.chmod(0o755)
    return path
