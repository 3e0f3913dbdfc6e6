"""The ways to make the edit that are compared; each is one row of the table."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.drivers import DRIVERS
from tests.image.tiny import PATH
from vmprovision.appliance.library import qemu_program
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE
from vmprovision.changes.operations import MakeDirectory, Symlink, WriteFile
from vmprovision.host.cache import CACHE_VARIABLE
from vmprovision.qemu.accelerator import choose_accelerator
from vmprovision.runtime.store import cached_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.bench.edit import Edit

BASELINE = "virt-customize"
BATCHES = (1, 4, 16, 64)
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The input of one measurement.

    Attributes:
        images: fresh copies of the image.
        edit: what to put into them.
        folder: an empty folder.
    """

    images: tuple[Path, ...]
    edit: Edit
    folder: Path

    @property
    def image(self) -> Path:
        """Return the only image."""
        (image,) = self.images
        return image


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to make the edit.

    Attributes:
        name: its name in the table.
        command: the command to run.
        images: how many images it works on at once.
        disk_format: of the images.
        phased: the command says itself where the measured part begins and ends.
        environment: variables to set, given the case.
        obstacle: why this host cannot run it; empty if it can.
        jobs: of a batch, for the plot.
        together: whether the batch shares its appliances.
    """

    name: str
    command: Callable[[Case], Sequence[str | Path]]
    images: int = 1
    disk_format: str = "qcow2"
    phased: bool = False
    environment: Callable[[Case], Mapping[str, str]] = field(default=lambda _: {})
    obstacle: Callable[[], str] = field(default=lambda: "")
    jobs: int | None = None
    together: bool = False


def guestfs_environment() -> dict[str, str]:
    """Return what programs of libguestfs need to run as quickly as ours do."""
    tcg = {"LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}
    is_kvm = choose_accelerator(qemu_program()).accelerator == "kvm"
    return {"LIBGUESTFS_BACKEND": "direct", **({} if is_kvm else tcg)}


def virt_customize(case: Case) -> list[str | Path]:
    """Return virt-customize's options for the edit."""
    words: list[str | Path] = ["virt-customize", "--quiet", "--no-network"]
    words += ["--format", case.image.suffix[1:], "-a", case.image]
    for each in case.edit.operations:
        if isinstance(each, MakeDirectory):
            words += ["--mkdir", str(each.path)]
        elif isinstance(each, WriteFile):
            words += ["--copy-in", f"{case.edit.local(each.path)}:{each.path.parent}"]
        elif isinstance(each, Symlink):
            words += ["--link", f"{each.target}:{each.path}"]
    return words


def guestfish(case: Case, *, inspect: bool) -> list[str | Path]:
    """Return a guestfish script for the edit, which finds the root itself or is given it."""
    lines = [] if inspect else ["run", f"mount {case.edit.root} /"]
    for each in case.edit.operations:
        if isinstance(each, MakeDirectory):
            lines.append(f"mkdir-p {each.path}")
        elif isinstance(each, WriteFile):
            lines.append(f"upload {case.edit.local(each.path)} {each.path}")
            lines.append(f"chmod 0{each.mode:o} {each.path}")
        elif isinstance(each, Symlink):
            lines.append(f"ln-sf {each.target} {each.path}")
    script = case.folder / "edit.fish"
    script.write_text("\n".join(lines) + "\n")
    return [
        *("guestfish", "--rw", "--format=qcow2", "-a", case.image),
        *(["-i"] if inspect else []),
        *("-f", script),
    ]


def plain_libguestfs(case: Case) -> list[str | Path]:
    """Return a program that uses the binding, call by call."""
    return [sys.executable, HERE / "plain_libguestfs.py", case.image, case.edit.manifest]


def command_line(case: Case, words: Sequence[str] = ()) -> list[str | Path]:
    """Return our command line for all images of the case."""
    return [Path(sys.executable).with_name("vmprovision"), "inject", *case.images, *words]


def new_host(case: Case) -> dict[str, str]:
    """Make a cache as after the installation of a wheel."""
    return new_cache(case.folder)


def new_cache(folder: Path) -> dict[str, str]:
    """Make a cache in a folder that has the runtime and nothing else; return its variable."""
    cache = folder / "cache"
    runtimes = cached_folder()
    shutil.copytree(runtimes, cache / "runtimes" / runtimes.name)
    cache.chmod(0o700)
    return {CACHE_VARIABLE: str(cache)}


def driver(name: str) -> Callable[[Case], list[str | Path]]:
    """Return a driver of drivers.py for all images of the case."""
    assert name in DRIVERS
    return lambda case: [sys.executable, "-m", "tests.bench.drivers", name, *case.images]


def loop_mount(case: Case) -> list[str | Path]:
    """Return what root can do with a raw image."""
    mount = shlex.quote(str(case.folder / "mnt"))
    lines = [
        "set -e",
        f"mkdir {mount}",
        f"mount -o loop,offset={_first_partition(case.image)} {case.image} {mount}",
    ]
    for each in case.edit.operations:
        if isinstance(each, MakeDirectory):
            lines.append(f"mkdir -p {mount}{each.path}")
        else:
            lines.append(f"cp -a {case.edit.local(each.path)} {mount}{each.path}")
    lines.append(f"umount {mount}")
    script = case.folder / "edit.sh"
    script.write_text("\n".join(lines) + "\n")
    return ["sh", script]


def _first_partition(image: Path) -> int:
    """Return the start of the image's first partition in bytes; the recipes' roots are there."""
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{PATH}"}
    shown = subprocess.run(
        ["sfdisk", "--json", image], check=True, capture_output=True, env=environment
    )
    table = json.loads(shown.stdout)["partitiontable"]
    return int(table["partitions"][0]["start"]) * 512


def _installed(program: str, package: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(program) else f"not measured: install {package}"


def _root_only() -> str:
    return "" if os.geteuid() == 0 else "not measured: only root can"


WAYS: tuple[Way, ...] = (
    Way(
        name=BASELINE,
        command=virt_customize,
        obstacle=_installed("virt-customize", "guestfs-tools"),
    ),
    Way(
        name="guestfish, inspecting",
        command=lambda case: guestfish(case, inspect=True),
        obstacle=_installed("guestfish", "libguestfs-tools"),
    ),
    Way(
        name="guestfish, root given",
        command=lambda case: guestfish(case, inspect=False),
        obstacle=_installed("guestfish", "libguestfs-tools"),
    ),
    Way(name="libguestfs from Python, `inspect_os`", command=plain_libguestfs),
    Way(
        name="`vmprovision inject`, stock appliance",
        command=command_line,
        environment=lambda _: {STOCK_VARIABLE: "1"},
    ),
    Way(
        name="`vmprovision inject`, first run on a host",
        command=command_line,
        environment=new_host,
    ),
    Way(name="`vmprovision inject`", command=command_line),
    Way(name="`vmprovision.inject()`, the call alone", command=driver("library"), phased=True),
    Way(name="`vmprovision.inject(pool=)`, the call alone", command=driver("pool"), phased=True),
    Way(
        name="root: loop mount and `cp`, raw image",
        command=loop_mount,
        disk_format="raw",
        obstacle=_root_only,
    ),
    *(
        Way(
            name=f"`inject --jobs {jobs}` of {images}",
            command=functools.partial(command_line, words=("--jobs", str(jobs))),
            images=images,
            jobs=jobs,
        )
        for images in BATCHES
        for jobs in (1, 2)
    ),
    *(
        Way(
            name=f"`inject --together --jobs 1` of {images}",
            command=functools.partial(command_line, words=("--together", "--jobs", "1")),
            images=images,
            jobs=1,
            together=True,
        )
        for images in BATCHES
    ),
)
