"""``nox -s hostile``: mutated guest files and disk structures, read within limits.

Every input starts as a valid one and is cut, repeated, spliced and corrupted; repeating
finds parsers that are not linear.  A mutation must give a right answer or a documented
refusal.  Any other is kept in ``tests/hostile/corpus``, which the default tests read
again.  The mutations are drawn from a seed, so a run can be repeated.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import vmprovision
from tests.hostile.guests import SEEDS, Seed, plant
from tests.hostile.limits import is_right, outcome_of
from vmprovision.disklayout.partitions import UnclearLayoutError, parse_partitions
from vmprovision.disklayout.superblocks import identify
from vmprovision.image.chain import open_chain
from vmprovision.image.diskfile import open_disk_file
from vmprovision.image.header import determine_format

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CORPUS = Path(__file__).with_name("corpus")
LARGEST = 2 << 20  # bytes of a mutated input; files are read with smaller limits
KEPT = 256 << 10  # bytes of one that is kept
MINUTES = 10.0
BATCH = 40  # inputs for one process; a failing batch is taken apart
INTERESTING = (b"\0", b"\xff", b"\\", b'"', b"'", b"\n", b"=", b"${a}", b"{", b"}", b"(.*)*", b":")

Act = Callable[[bytes, Path], object]  # what is done with an input, in an empty directory


def _look_at_guest(seed: Seed) -> Act:
    def act(content: bytes, folder: Path) -> object:
        root = plant(seed, content, folder / "root")
        return vmprovision.plan(root)

    return act


def _look_at_image(suffix: str) -> Act:
    def act(content: bytes, folder: Path) -> object:
        image = folder / f"disk.{suffix}"
        image.write_bytes(content)
        with (
            open_disk_file(image, write=False) as file,
            open_chain(
                file, determine_format(file, None), allow_outside=False, write=False
            ) as base,
        ):
            return base.files()

    return act


def _look_at_table(content: bytes, _folder: Path) -> object:
    try:
        return parse_partitions(content)
    except UnclearLayoutError:
        return None


def _look_at_superblock(content: bytes, _folder: Path) -> object:
    return identify(content)


def make_targets(folder: Path) -> dict[str, tuple[list[bytes], Act]]:
    """Return what is fuzzed: for each name the valid inputs, and what to do with a mutated one."""
    targets: dict[str, tuple[list[bytes], Act]] = {}
    for seed in SEEDS:
        name = seed.path.strip("/").replace("/", "-")
        while name in targets:  # another guest with the same file
            name += "+"
        targets[name] = ([seed.content], _look_at_guest(seed))
    for suffix in ("qcow2", "vmdk", "vhdx", "vdi"):
        targets[f"image-{suffix}"] = (list(_images(folder, suffix)), _look_at_image(suffix))
    targets["partitions"] = (list(_tables(folder)), _look_at_table)
    targets["superblock"] = (list(_superblocks(folder)), _look_at_superblock)
    return targets


def _images(folder: Path, suffix: str) -> Iterator[bytes]:
    base = folder / f"base.{suffix}"
    subprocess.run(["qemu-img", "create", "-q", "-f", suffix, base, "64M"], check=True)
    yield base.read_bytes()[: 1 << 20]
    if suffix in ("qcow2", "vmdk"):
        top = folder / f"top.{suffix}"
        command: list[str | Path] = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            suffix,
            "-F",
            suffix,
            "-b",
            base.name,
            top,
        ]
        subprocess.run(command, check=True, cwd=folder)
        yield top.read_bytes()[: 1 << 20]


def _tables(folder: Path) -> Iterator[bytes]:
    for label in ("gpt", "dos"):
        disk = folder / f"table-{label}"
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        script = f"label: {label}\n,8M\n,8M\n,8M,{'E' if label == 'dos' else ''}\n"
        sfdisk = str(shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin:/bin"))
        subprocess.run([sfdisk, "-q", disk], check=True, input=script, text=True)
        yield disk.read_bytes()[: 1 << 20]


def _superblocks(folder: Path) -> Iterator[bytes]:
    for number, command in enumerate((("mke2fs", "-q", "-F", "-t", "ext4"), ("mkswap",))):
        volume = folder / f"volume{number}"
        with volume.open("wb") as file:
            file.truncate(16 << 20)
        program = str(shutil.which(command[0], path="/usr/sbin:/sbin"))
        subprocess.run([program, *command[1:], volume], check=True, capture_output=True)
        yield volume.read_bytes()[: 128 << 10]


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return a valid input after one to six changes."""
    for _ in range(chance.randint(1, 6)):
        content = chance.choice((_corrupt, _cut, _repeat, _splice, _insert))(content, chance)
        content = content[:LARGEST]
    return content


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    ends = sorted((chance.randint(0, len(content)), chance.randint(0, len(content))))
    return ends[0], min(ends[1], ends[0] + chance.choice((1, 4, 16, 64, 4096)))


def _corrupt(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 4, 16))):
        if changed:
            changed[chance.randrange(min(len(changed), chance.choice((64, 1024, LARGEST))))] = (
                chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            )
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    return content[:start] + content[end:]


def _repeat(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    times = chance.choice((2, 30, 1000, LARGEST // max(end - start, 1)))
    return content[:start] + content[start:end] * times + content[end:]


def _splice(content: bytes, chance: random.Random) -> bytes:
    start, end = _span(content, chance)
    at = chance.randint(0, len(content))
    return content[:at] + content[start:end] + content[at:]


def _insert(content: bytes, chance: random.Random) -> bytes:
    at = chance.randint(0, len(content))
    times = chance.choice((1, 1, 30, 5000))
    return content[:at] + chance.choice(INTERESTING) * times + content[at:]


def try_inputs(act: Act, inputs: Sequence[bytes]) -> list[str]:
    """Return the outcome of each input; one process tries them all if all are right."""

    def all_of_them() -> None:
        for content in inputs:
            with (
                contextlib.suppress(vmprovision.VmprovisionError),
                tempfile.TemporaryDirectory(prefix="vmprovision-fuzz-") as folder,
            ):
                act(content, Path(folder))

    if len(inputs) > 1 and is_right(outcome_of(all_of_them)):
        return ["right"] * len(inputs)
    return [_alone(act, content) for content in inputs]


def _alone(act: Act, content: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="vmprovision-fuzz-") as folder:
        outcome = outcome_of(lambda: act(content, Path(folder)))
    return "right" if is_right(outcome) else outcome


def _keep(name: str, content: bytes) -> Path:
    place = CORPUS / name / hashlib.sha256(content).hexdigest()[:16]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content[:KEPT])
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz for some minutes; return 1 if an input was neither answered nor refused properly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long ({MINUTES})")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--target", action="append", help="only this; may be given again")
    asked = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * asked.minutes
    count: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="vmprovision-fuzz-") as folder:
        targets = make_targets(Path(folder))
        names = [name for name in targets if not asked.target or name in asked.target]
        for number, name in ((number, name) for number in itertools.count() for name in names):
            if time.monotonic() > ends:
                break
            seeds, act = targets[name]
            chance = random.Random(f"{asked.seed}-{number}-{name}")
            inputs = [mutate(chance.choice(seeds), chance) for _ in range(BATCH)]
            for content, outcome in zip(inputs, try_inputs(act, inputs), strict=True):
                count[name] += 1
                if outcome != "right":
                    sys.stdout.write(f"{name}: {outcome}: {_keep(name, content)}\n")
                    sys.stdout.flush()
                    count["faults"] += 1
    faults = count.pop("faults", 0)
    sys.stdout.write(f"{sum(count.values())} inputs of {len(count)} kinds, {faults} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
