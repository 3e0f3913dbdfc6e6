"""The support matrix: which guests were really tried, as a page for users.

``nox -s boot-matrix`` builds, injects and boots every recipe of ``images/``, makes a plan
for every real tree of ``tests/inspection/real_trees.py``, and writes the results to
``docs/support-matrix.md``, with a summary there and in the README.  The cache keeps a
boot's result until its recipe or vmprovision changes, so an interrupted run goes on.
``--kept`` boots nothing: it writes the kept results, and what the page already says of
the other guests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import vmprovision
from tests.inspection.real_trees import REAL_TREES, assemble, look_at
from tests.inspection.test_generated import GUESTS
from tests.proof.page import EMPTY, FAILED, REFUSED, REPOSITORY, Row, rows_on_page, write_page
from tests.proof.printed import OPTIONS, boot_printed_service
from tests.trees import make_tree, root_filesystems
from vmprovision.errors import ProofError, UnsupportedGuestError, VmprovisionError
from vmprovision.host.cache import cache_directory, write_atomically
from vmprovision.initsystem import DEFINITIONS
from vmprovision.junit import TestCase, junit_document
from vmprovision.progress import Control
from vmprovision.proof.machine.options import HARDWARE, find_qemu
from vmprovision.qemu.accelerator import choose_accelerator
from vmprovision.recipe import build_image, list_recipes
from vmprovision.runtime.store import host_architecture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.inspection.real_trees import RealTree
    from vmprovision.recipe import Recipe

BOOT_SECONDS = 900.0  # a busy host is slow
FOREIGN_SECONDS = 1800.0  # QEMU emulates every instruction
# guests that are refused with a service to add
REFUSED_RECIPES = ("debian-13-shepherd",)
REFUSED_TREES = ("nixos that was installed", "guix that was installed")
JOBS = min(os.cpu_count() or 1, 4)  # a guest keeps one core busy and takes half a gigabyte


def try_recipe(recipe: Recipe, control: Control, tarballs: Path | None = None) -> Row:
    """Return what a boot of the recipe's image showed: from the cache, or from a boot now."""
    folder = tarballs or root_filesystems()
    kept = kept_result(recipe)
    if kept.exists():
        return Row(**json.loads(kept.read_text(encoding="utf-8")))
    guest = f"`{recipe.name}`"
    if recipe.tarball and not (folder / recipe.tarball.name).exists():
        how = f"{recipe.tarball.name} is not in the test data"
        return Row(guest=guest, result="not tried", how=how)
    try:
        row = boot_recipe(recipe, folder if recipe.tarball else None, control)
    except VmprovisionError as exc:
        if isinstance(exc, ProofError):
            sys.stderr.writelines(f"{recipe.name}: {line}\n" for line in exc.console)
        return Row(guest=guest, result=FAILED, how=" ".join(exc.message.split()))
    write_atomically(kept, json.dumps(asdict(row)).encode())
    return row


def kept_result(recipe: Recipe) -> Path:
    """Return where the result of a boot is kept, for this recipe and this source."""
    return cache_directory() / "matrix" / f"{recipe.name}-{recipe.key()}-{source_key()}.json"


def row_on_page(recipe: Recipe) -> Row:
    """Return what the page says of a recipe that an earlier run booted."""
    for row in rows_on_page():
        if row.how.startswith(f"`{recipe.name}`, "):
            return row
    how = "the next run of the matrix boots it"
    return Row(guest=f"`{recipe.name}`", result="not tried", how=how)


def boot_recipe(recipe: Recipe, tarball: Path | None, control: Control) -> Row:
    """Build, inject and prove."""
    with tempfile.TemporaryDirectory(prefix="vmprovision-matrix-") as folder:
        disk = Path(folder) / "guest.qcow2"
        build_image(
            recipe.name,
            output=disk,
            control=control,
            recipes=recipe.folders[-1].parent,
            tarball=tarball,
        )
        if recipe.name in REFUSED_RECIPES:
            return boot_refused(recipe, disk, control)
        guest = vmprovision.inject(disk, control=control).guest
        seconds = BOOT_SECONDS if guest.arch == host_architecture() else FOREIGN_SECONDS
        reports = [
            vmprovision.prove(disk, options, control=control)
            for options in proofs_of(recipe, seconds)
        ]
    kernel, runtime = reports[0].information["kernel"], reports[0].information["runtime"]
    boots = " and ".join(f"{each.booted_by}, {each.seconds:.0f} s" for each in reports)
    return Row(
        guest=guest.distribution.product_name,
        arch=guest.arch,
        system=reports[0].init,
        pid1=guest.init.pid1,
        runtime=runtime,
        result="booted",
        commit=commit(),
        how=f"`{recipe.name}`, {recipe.disk.filesystem}, Linux {kernel}, {boots}, {today()}",
    )


def proofs_of(recipe: Recipe, seconds: float) -> list[vmprovision.ProofOptions]:
    """Return the options of each proof: GRUB is started by a PC's BIOS and by UEFI."""
    options = vmprovision.ProofOptions(timeout=seconds)
    if recipe.disk.bootloader != "grub":
        return [options]
    return [replace(options, firmware="bios"), replace(options, firmware="uefi")]


def boot_refused(recipe: Recipe, disk: Path, control: Control) -> Row:
    """Add to a guest what ``inject`` prints instead of an injection, and boot it."""
    guest = vmprovision.inspect(disk)
    try:
        vmprovision.inject(disk, OPTIONS, control=control)
    except UnsupportedGuestError as exc:
        printed, why = exc.configuration, reason(exc, disk)
    else:
        return Row(guest=f"`{recipe.name}`", result=FAILED, how="it was injected into")
    information, seconds = boot_printed_service(
        disk, printed, seconds=BOOT_SECONDS, control=control
    )
    kernel = information["kernel"]
    return Row(
        guest=guest.distribution.product_name,
        arch=guest.arch,
        pid1=guest.init.pid1,
        runtime=information["runtime"],
        result=REFUSED,
        commit=commit(),
        how=f"`{recipe.name}`, {why}; booted with the printed service: "
        f"{recipe.disk.filesystem}, Linux {kernel}, {seconds:.0f} s, {today()}",
    )


def reason(refusal: UnsupportedGuestError, guest: Path) -> str:
    """Return the message of a refusal without the path of the guest."""
    return refusal.message.removeprefix(f"{guest}: ")


def check_refusal(name: str) -> Row:
    """Return what a plan says of a layout that must be refused with something to add."""
    with tempfile.TemporaryDirectory(prefix="vmprovision-matrix-") as folder:
        root = make_tree(Path(folder) / "guest", GUESTS[name][1])
        guest = vmprovision.inspect(root)
        try:
            vmprovision.plan(root)
            result, how = FAILED, "a plan was made"
        except UnsupportedGuestError as exc:
            result, how = REFUSED if exc.configuration else FAILED, reason(exc, root)
    return Row(
        guest=guest.distribution.product_name,
        arch=EMPTY if guest.arch == "unknown" else guest.arch,
        pid1=guest.init.pid1,
        result=result,
        how=f"its layout, from its documentation: {how}",
    )


@cache
def commit() -> str:
    """Return the commit of the sources, with ``+`` if they have changes."""
    git = ("git", "-C", str(REPOSITORY), "describe", "--always", "--exclude=*", "--dirty=+")
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def today() -> str:
    """Return the date of a boot."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def check_tree(tree: RealTree) -> Row:
    """Return what a plan for a real guest's files shows."""
    what = (
        "its root filesystem"
        if tree.tarball
        else "its `/etc`, with stand-ins for programs"
        if tree.etc
        else "its layout, from its documentation"
    )
    with tempfile.TemporaryDirectory(prefix="vmprovision-matrix-") as folder:
        root = assemble(tree, Path(folder) / "guest")
        if root is None:
            how = f"`{tree.tarball}` is not in the test data"
            return Row(guest=tree.name, result="not tried", how=how)
        guest = vmprovision.inspect(root)
        seen = look_at(root)
    right = seen == tree.expected
    return Row(
        guest=guest.distribution.product_name,
        arch=guest.arch,
        system=seen.system,
        pid1=seen.pid1,
        result="files checked" if right else FAILED,
        how=what if right else f"{what}: {seen} and not {tree.expected}",
    )


def absent_tarballs() -> list[str]:
    """Return the root filesystems that this host lacks, of those in the table."""
    tarballs = (each.tarball for each in REAL_TREES if each.tarball)
    return [name for name in tarballs if not (root_filesystems() / name).exists()]


def source_key() -> str:
    """Return a short hash of everything that decides what is injected and how it is proven."""
    digest = hashlib.sha256()
    for folder in ("vmprovision", "templates"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def untried(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield a row for each init system that has none."""
    there = {row.system for row in rows}
    for definition in DEFINITIONS:
        if definition.name not in there:
            how = "no guest of the matrix has it; its operations are tested"
            yield Row(system=definition.name, result="not tried", how=how)


def speed_of_boots() -> str:
    """Return whether this host's guests run with KVM, as the page says it."""
    accelerator = choose_accelerator(find_qemu("x86_64", HARDWARE["x86_64"])).accelerator
    return "with KVM" if accelerator == "kvm" else "without KVM"


def as_test(recipe: Recipe, row: Row, seconds: float) -> TestCase:
    """Return a recipe's result for the JUnit file."""
    error = ProofError(row.how) if row.result == FAILED else None
    skipped = row.how if row.result == "not tried" else ""
    return TestCase(
        group="boot-matrix",
        name=recipe.name,
        seconds=seconds,
        output=row.how,
        error=error,
        skipped=skipped,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is requested; return 1 if anything failed.

    The page is written only if everything was tried.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="*", help="try only these, and do not write the page")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many guests at a time")
    parser.add_argument(
        "--kept", action="store_true", help="boot nothing; write what earlier runs found"
    )
    parser.add_argument("--junit", type=Path, help="write the results of the boots as JUnit XML")
    asked = parser.parse_args(arguments)
    if asked.kept and (absent := absent_tarballs()):
        parser.error(f"--kept would lose the rows of {', '.join(absent)}: tests/data/README.md")
    begun = time.monotonic()
    recipes = [r for r in list_recipes() if not asked.recipe or r.name in asked.recipe]

    def tell(recipe: Recipe) -> tuple[Row, TestCase]:
        began = time.monotonic()
        if asked.kept and not kept_result(recipe).exists():
            row = row_on_page(recipe)
        else:
            row = try_recipe(recipe, Control())
        took = time.monotonic() - began
        sys.stdout.write(f"{recipe.name}: {row.result}, {row.how} ({took:.0f} s in all)\n")
        sys.stdout.flush()
        return row, as_test(recipe, row, took)

    with ThreadPoolExecutor(asked.jobs) as pool:
        results = list(pool.map(tell, recipes))
    rows = [row for row, _ in results]
    if asked.junit:
        cases = [case for _, case in results]
        seconds = time.monotonic() - begun
        write_atomically(asked.junit, junit_document("boot-matrix", cases, seconds=seconds))
    if not asked.recipe:
        rows += [check_tree(tree) for tree in REAL_TREES]
        rows += [check_refusal(name) for name in REFUSED_TREES]
        write_page([*rows, *untried(rows)], speed=speed_of_boots())
    failed = sum(row.result == FAILED for row in rows)
    sys.stdout.write(f"{len(rows) - failed} guests are right or were not tried, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
