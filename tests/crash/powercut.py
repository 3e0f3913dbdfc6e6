"""Power cuts: the states that a disk can have after one in the middle of a merge.

A kill leaves everything that was written.  A power cut leaves what was *synced*, and any
part of the rest.  So qemu-nbd serves the image's file to the merge through QEMU's
``blklogwrites`` filter, which records each write and each flush, in order.  From that
record the possible states of the disk are made: all writes before a flush, and a random
choice of those after it.
"""

from __future__ import annotations

import shutil
import stat
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SECTOR = 512
_MAGIC = 0x6A736677736872  # of the dm-log-writes format, which the filter writes
_HEADER = struct.Struct("<QQQI")  # magic, version, entries, sector size
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, length of data
_FLUSH, _DISCARD = 1, 4
_ROOM = 8 << 20  # an NBD export does not grow, and a qcow2 does
_PROGRAM = """\
#!{python}
import json, os, shutil, subprocess, sys, time
from pathlib import Path
words = sys.argv[1:]
if words[0] != "commit":
    os.execv({real!r}, ["qemu-img", *words])
kept = Path({kept!r})
for redo_log in Path({folder!r}).glob("*.vmprovision-merging"):
    shutil.copy2(redo_log, kept / redo_log.name)
overlay = json.loads(words[-1].removeprefix("json:"))
image = overlay["backing"]["file"]["filename"]
if overlay["backing"]["driver"] == "qcow2":
    os.truncate(image, os.stat(image).st_size + {room})
log, socket = kept / "log", kept / "socket"
log.touch()
node = "driver=blklogwrites,log-sector-size={sector},log.driver=file,log.filename=" + str(log)
node += ",file.driver=file,file.locking=off,file.filename=" + image
server = subprocess.Popen(
    ["qemu-nbd", "-k", str(socket), "--cache=writeback", "--image-opts", node],
    close_fds=False,
)
while not socket.exists():
    assert server.poll() is None, "qemu-nbd did not start"
    time.sleep(0.02)
overlay["backing"]["file"] = {{
    "driver": "nbd", "server": {{"type": "unix", "path": str(socket)}}
}}
words[-1] = "json:" + json.dumps(overlay)
status = subprocess.run([{real!r}, *words], close_fds=False).returncode
server.wait(60)
sys.exit(status)
"""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that were written at an offset."""

    offset: int
    content: bytes


def recording_qemu_img(folder: Path, images: Path) -> Path:
    """Make a directory for PATH whose ``qemu-img commit`` is the real one, and recorded.

    The files to merge are first copied into ``folder``, beside the record, ``log``.
    """
    programs = folder / "bin"
    programs.mkdir()
    program = programs / "qemu-img"
    program.write_text(
        _PROGRAM.format(
            python=sys.executable,
            kept=str(folder),
            folder=str(images),
            sector=SECTOR,
            room=_ROOM,
            real=shutil.which("qemu-img"),
        )
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return programs


def read_record(log: Path) -> list[list[Write]]:
    """Return the writes of a record, grouped by flushes."""
    content = log.read_bytes()
    magic, _, count, sector = _HEADER.unpack_from(content)
    assert magic == _MAGIC
    assert sector == SECTOR
    epochs: list[list[Write]] = [[]]
    place = SECTOR
    for _ in range(count):
        at, sectors, flags, _ = _ENTRY.unpack_from(content, place)
        place += SECTOR
        assert not flags & _DISCARD, "a merge that discards is not expected"
        if sectors:
            size = sectors * SECTOR
            epochs[-1].append(Write(at * SECTOR, content[place : place + size]))
            place += size
        if flags & _FLUSH:
            epochs.append([])
    return epochs


def possible_states(
    before: bytes, epochs: Sequence[Sequence[Write]], chance: random.Random, each: int
) -> Iterator[bytes]:
    """Yield states of a disk after a power cut: ``each`` of them between every two flushes.

    Args:
        before: what it held before the merge.
        epochs: the writes between flushes.
        chance: chooses which of the unflushed writes have reached it.
        each: how many choices.
    """
    settled = bytearray(before)
    for epoch in epochs:
        if epoch:
            for _ in range(each):
                state = bytearray(settled)
                share = chance.choice((0.2, 0.5, 0.9))
                _apply(state, [write for write in epoch if chance.random() < share])
                yield bytes(state)
        _apply(settled, epoch)
    yield bytes(settled)


def _apply(disk: bytearray, writes: Sequence[Write]) -> None:
    for write in writes:
        end = write.offset + len(write.content)
        if end > len(disk):
            disk.extend(bytes(end - len(disk)))
        disk[write.offset : end] = write.content
