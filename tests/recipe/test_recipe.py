"""Recipes: their syntax, and building images from them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.appliance.session import Drive, launch
from vmprovision.errors import CancelledError, RecipeError
from vmprovision.host.mirrors import parse_index_targets
from vmprovision.progress import Control
from vmprovision.proof.machine import HARDWARE
from vmprovision.recipe import (
    build_image,
    emulation,
    find_recipe,
    list_recipes,
    parse_recipe,
)
from vmprovision.recipe.packages import host_apt_settings, mmdebstrap_command, pack_files
from vmprovision.runtime.store import OTHER_NAMES

if TYPE_CHECKING:
    from vmprovision.recipe import Recipe

UUID = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a12ff"
SMALL = f"""\
description = "one static program"
architecture = "amd64"
suite = "bookworm"
variant = "extract"
packages = ["busybox-static"]
leave_out = ["/*"]
keep = ["/bin/busybox"]
shell = "/bin/busybox sh"
customise = "/bin/busybox touch /made-inside"
remove = ["/etc/apt", "/var"]

[disk]
size_mb = 32
partition_table = "gpt"
filesystem = "ext4"
features = []
uuid = "{UUID}"
bootloader = "none"
command_line = "root=UUID={UUID}"
"""


def write_recipe(folder: Path, content: str = SMALL, name: str = "small") -> Path:
    """Make a recipe folder with this recipe.toml."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "recipe.toml").write_text(content, encoding="utf-8")
    return made


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_shipped_recipes_agree_with_themselves(recipe: Recipe) -> None:
    """The root filesystem that fstab and the kernel command line name is the one that is built."""
    fstab = recipe.files()["etc/fstab"].read_text(encoding="utf-8")
    group = recipe.disk.volume_group
    root = f"/dev/mapper/{group}-root" if group else f"UUID={recipe.disk.uuid}"
    assert fstab.startswith(f"{root} / {recipe.disk.filesystem} ")
    if recipe.disk.bootloader != "grub":  # its own program finds the root
        assert f"root=UUID={recipe.disk.uuid} " in recipe.disk.command_line
    assert ("LABEL=BOOT /boot " in fstab) == bool(recipe.disk.boot_mb)
    kernel = recipe.architectures[-1]
    hardware = HARDWARE[{**OTHER_NAMES, "amd64": "x86_64"}.get(kernel, kernel)]
    assert f"console={hardware.console}" in recipe.disk.command_line


def test_shipped_recipes_are_listed_by_name() -> None:
    """The two recipes that tests and documentation use exist."""
    names = [recipe.name for recipe in list_recipes()]
    assert names == sorted(names)
    assert {"busybox-standalone", "debian-12-systemd"} <= set(names)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('suite = "bookworm"\n', "", "suite is missing"),
        ('suite = "bookworm"', "suite = 12", "suite must be a text"),
        ('suite = "bookworm"', 'suite = "../evil"', "suite cannot be"),
        ('variant = "extract"', 'variant = "tiny"', "must be one of extract"),
        ('packages = ["busybox-static"]', 'packages = "busybox"', "packages must be a list"),
        ('"busybox-static"', '"--simulate"', "packages cannot hold '--simulate'"),
        ('leave_out = ["/*"]', 'leave_out = ["doc"]', "leave_out cannot hold 'doc'"),
        ("[disk]", "kernel = 'linux:vax'\n[disk]", "kernel cannot be 'linux:vax'"),
        ("[disk]", "surprise = 1\n[disk]", "surprise is not a key of a recipe"),
        ("[disk]", "updates = 1\n[disk]", "updates must be true or false"),
        ("[disk]", "tarball = 'a.tar'\n[disk]", "tarball must be a table"),
        ("[disk]", "[tarball]\nname = '../a.tar'\n[disk]", "tarball.name cannot be"),
        ("[disk]", "[tarball]\nname = 'a.zip'\n[disk]", "tarball.name cannot be"),
        ("[disk]", "[tarball]\nname = 'a.tar'\n[disk]", "tarball.sha256 is missing"),
        ("size_mb = 32", "size_mb = true", "disk.size_mb must be a whole number"),
        ("size_mb = 32", "size_mb = 8", "disk.size_mb must be a whole number from 32"),
        (f'uuid = "{UUID}"', 'uuid = "none"', "disk.uuid is 'none', which is not a UUID"),
        ("features = []", 'features = ["-a"]', "disk.features cannot hold '-a'"),
        ('bootloader = "none"', 'bootloader = "extlinux"', 'needs partition_table = "mbr"'),
        ('bootloader = "none"', 'bootloader = "grub"\nvolume_group = "a/b"', "cannot be 'a/b'"),
        ("features = []", "features = []\nboot_mb = 8", 'must be "grub" with boot_mb'),
        ("features = []", 'features = []\nsubvolumes = ["@:/"]', "must be given for btrfs"),
        ('filesystem = "ext4"', 'filesystem = "btrfs"', "must be given for btrfs"),
        (
            'filesystem = "ext4"',
            'filesystem = "btrfs"\nsubvolumes = ["@home:/home"]',
            "must name the one of /",
        ),
        ('filesystem = "ext4"', 'filesystem = "btrfs"\nsubvolumes = ["@"]', "cannot hold '@'"),
        ('command_line = "', 'comand_line = "', "disk.command_line is missing"),
        ('command_line = "', 'command_line = "a\\nb', "disk.command_line must be one line"),
        ("[disk]", "[disc]", "disk must be a table"),
        ("[disk]", "[disk", "recipe.toml"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    """The error names the file and the key."""
    assert old in SMALL
    folder = write_recipe(tmp_path, SMALL.replace(old, new, 1))
    with pytest.raises(RecipeError, match=re.escape(complaint)) as caught:
        parse_recipe(folder)
    assert str(folder / "recipe.toml") in str(caught.value)


def test_a_kernel_of_another_architecture_adds_that_one(tmp_path: Path) -> None:
    """Debian 13 has no kernel for i386, so its guest there has one for amd64."""
    recipe = find_recipe("debian-13-i386")
    assert recipe.architectures == ("i386", "amd64")
    command = mmdebstrap_command(recipe, files=tmp_path / "files", target=tmp_path / "tar")
    assert "--architectures=i386,amd64" in command
    (included,) = [word for word in map(str, command) if word.startswith("--include=")]
    assert "linux-image-cloud-amd64:amd64" in included.removeprefix("--include=").split(",")


@pytest.mark.parametrize(
    ("registered", "works"),
    [
        ("enabled\ninterpreter /usr/bin/qemu-x-static\nflags: PF\noffset 0\n", True),
        ("enabled\ninterpreter /usr/bin/qemu-x-static\nflags: P\noffset 0\n", False),
        ("disabled\ninterpreter /usr/bin/qemu-x-static\nflags: PF\noffset 0\n", False),
        (None, False),
    ],
)
def test_a_foreign_guest_needs_an_emulator_that_works_in_another_root(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registered: str | None,
    works: bool,  # noqa: FBT001 -- a case of the table above
) -> None:
    """The kernel must have opened the emulator beforehand (flag F); the error says what to do."""
    monkeypatch.setattr(emulation, "REGISTERED", tmp_path)
    monkeypatch.setattr(emulation, "NATIVE", {})
    if registered is not None:
        (tmp_path / "qemu-arm").write_text(registered, encoding="ascii")
    if works:
        emulation.require_emulation("armhf")
        return
    with pytest.raises(RecipeError, match="cannot run programs for armhf") as caught:
        emulation.require_emulation("armhf")
    assert "qemu-user-static" in caught.value.hint


def test_extlinux_wants_a_filesystem_that_it_can_read(tmp_path: Path) -> None:
    """An ext4 with the default features would not boot, so it is refused before the build."""
    content = SMALL.replace('bootloader = "none"', 'bootloader = "extlinux"')
    with pytest.raises(RecipeError, match="metadata_csum"):
        parse_recipe(write_recipe(tmp_path, content.replace('"gpt"', '"mbr"')))


def test_grub_wants_a_gpt(tmp_path: Path) -> None:
    """Its core image is in a partition that only a GPT has, so others are refused at once."""
    content = SMALL.replace('bootloader = "none"', 'bootloader = "grub"')
    with pytest.raises(RecipeError, match='grub needs partition_table = "gpt"'):
        parse_recipe(write_recipe(tmp_path, content.replace('"gpt"', '"mbr"')))


def test_a_recipe_says_only_what_differs(tmp_path: Path) -> None:
    """Lists are appended and the disk is merged; other values and files are replaced."""
    base = write_recipe(tmp_path, name="_base")
    own = write_recipe(
        tmp_path,
        'extends = "_base"\nsuite = "trixie"\npackages = ["kmod"]\n[disk]\nsize_mb = 64\n',
        name="own",
    )
    for folder, names in ((base, ("etc/motd", "etc/hosts")), (own, ("etc/motd",))):
        for name in names:
            path = folder / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(folder.name, encoding="ascii")
    recipe = parse_recipe(own)
    assert (recipe.suite, recipe.packages) == ("trixie", ("busybox-static", "kmod"))
    assert (recipe.disk.size_mb, recipe.disk.uuid) == (64, UUID)
    found = {place: path.read_text(encoding="ascii") for place, path in recipe.files().items()}
    assert found == {"etc/hosts": "_base", "etc/motd": "own"}
    assert [recipe.name for recipe in list_recipes(tmp_path)] == ["own"]


@pytest.mark.parametrize(
    ("extends", "complaint"),
    [("'other'", "extends 'own', which extends"), ("'../own'", "cannot be"), ("7", "cannot be")],
)
def test_recipes_that_extend_in_a_circle_are_refused(
    tmp_path: Path, extends: str, complaint: str
) -> None:
    """A base that is a path or not a string is refused."""
    own = write_recipe(tmp_path, f"extends = {extends}\n", name="own")
    write_recipe(tmp_path, "extends = 'own'\n", name="other")
    with pytest.raises(RecipeError, match=re.escape(complaint)):
        parse_recipe(own)


def test_links_among_the_files_are_refused(tmp_path: Path) -> None:
    """A wheel would carry a copy of the target, so a link cannot be part of a recipe."""
    folder = write_recipe(tmp_path)
    (folder / "files").mkdir()
    (folder / "files/link").symlink_to("/etc/hostname")
    with pytest.raises(RecipeError, match="not a regular file"):
        parse_recipe(folder)


@pytest.mark.parametrize("name", ["nowhere", "../small", "", "small/files"])
def test_an_unknown_recipe_is_told_with_those_that_exist(tmp_path: Path, name: str) -> None:
    """A recipe is found by its name, never by a path."""
    write_recipe(tmp_path / "images")
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="there are: small"):
        find_recipe(name, tmp_path / "images")


def test_the_key_follows_the_content_only(tmp_path: Path) -> None:
    """The key depends on the names and content of files, not on their folder or dates."""
    first = parse_recipe(write_recipe(tmp_path / "one"))
    folder = write_recipe(tmp_path / "two")
    same = parse_recipe(folder)
    assert first.key() == same.key()
    (folder / "files/etc").mkdir(parents=True)
    (folder / "files/etc/motd").write_bytes(b"hello")
    with_file = same.key()
    (folder / "files/etc/motd").rename(folder / "files/etc/mot")
    renamed = same.key()
    (folder / "files/etc/mot").write_bytes(b"hallo")
    other = parse_recipe(
        write_recipe(tmp_path / "three", SMALL.replace("size_mb = 32", "size_mb = 33"))
    )
    assert len({first.key(), with_file, renamed, same.key(), other.key()}) == 5


def test_files_belong_to_root_and_scripts_can_run(tmp_path: Path) -> None:
    """Modes depend on the content, because those of a checkout depend on its umask."""
    folder = write_recipe(tmp_path)
    for name, content in {"etc/rc": b"#!/bin/sh\n", "etc/motd": b"hello\n"}.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
    packed = pack_files(parse_recipe(folder))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        found = [(member.name, member.mode, member.uid) for member in archive.getmembers()]
    assert found == [("etc/motd", 0o644, 0), ("etc/rc", 0o755, 0)]


def test_mirrors_are_those_of_the_host() -> None:
    """Only Debian's main component of this host's archives is used, for the guest's suite."""
    printed = (
        "http://mirror.example/debian/\tDebian\ttrixie\tmain\t/usr/share/keyrings/a.gpg\n"
        "http://mirror.example/debian/\tDebian\ttrixie\tcontrib\t$(SIGNED_BY)\n"
        "http://mirror.example/debian/\tDebian\ttrixie-updates\tmain\t$(SIGNED_BY)\n"
        "http://mirror.example/debian/\tDebian\ttrixie-backports\tmain\t$(SIGNED_BY)\n"
        "https://mirror.example/security/\tDebian\ttrixie-security\tmain\t$(SIGNED_BY)\n"
        "file:/srv/debian/\tDebian\ttrixie\tmain\t$(SIGNED_BY)\n"
        "http://other.example/apt/\tOther\tstable\tmain\t$(SIGNED_BY)\n"
        "nonsense\n"
    )
    assert sorted(parse_index_targets(printed, "bookworm")) == [
        "deb [signed-by=/usr/share/keyrings/a.gpg] http://mirror.example/debian/ bookworm main",
        "deb http://mirror.example/debian/ bookworm-updates main",
        "deb https://mirror.example/security/ bookworm-security main",
    ]


def test_a_host_without_debian_mirrors_uses_the_default() -> None:
    """On an Ubuntu host the list is empty, so that mmdebstrap uses Debian's own address."""
    printed = "http://archive.example/ubuntu/\tUbuntu\tnoble\tmain\t$(SIGNED_BY)\n"
    assert parse_index_targets(printed, "bookworm") == []


def test_a_release_without_support_is_taken_from_its_own_archive() -> None:
    """Old releases and unstable get no update archives: theirs are incomplete or do not exist."""
    printed = (
        "http://mirror.example/debian/\tDebian\ttrixie\tmain\t$(SIGNED_BY)\n"
        "https://mirror.example/security/\tDebian\ttrixie-security\tmain\t$(SIGNED_BY)\n"
    )
    for suite, updates in (("bullseye", False), ("sid", True)):
        lines = parse_index_targets(printed, suite, updates=updates)
        assert lines == [f"deb http://mirror.example/debian/ {suite} main"]


def test_only_what_reaches_the_mirror_is_passed_on() -> None:
    """Only the settings for reaching a mirror are passed on, not hooks or directories."""
    for line in host_apt_settings():
        assert re.match(r"Acquire::[A-Za-z]", line)
        assert "Dir::" not in line


def test_an_existing_output_is_refused_at_once(tmp_path: Path) -> None:
    """An existing output is refused before building, and stays unchanged."""
    write_recipe(tmp_path)
    output = tmp_path / "mine.qcow2"
    output.write_bytes(b"precious")
    with pytest.raises(RecipeError, match="exists"):
        build_image("small", output=output, control=Control(), recipes=tmp_path)
    assert output.read_bytes() == b"precious"


def test_a_cancelled_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that is cancelled before it begins leaves no image and no build directory."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    write_recipe(tmp_path / "recipes")
    control = Control()
    control.cancelled.set()
    with pytest.raises(CancelledError):
        build_image("small", control=control, recipes=tmp_path / "recipes")
    left = [path.suffix for path in (tmp_path / "cache/images").iterdir()]
    assert left == [".lock"]


def is_run(words: str) -> bool:
    """Return whether a process of this host has these words in its command line."""
    wanted = words.replace(" ", "\0").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes():
                return True
    return False


@pytest.mark.boot
def test_sigterm_ends_a_build_and_its_programs(tmp_path: Path) -> None:
    """No process, no mount and no folder is left, neither in the cache nor elsewhere."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    hanging = f"/bin/busybox sleep {secrets.randbelow(10**6) + 10**6}"
    write_recipe(tmp_path, SMALL.replace("/bin/busybox touch /made-inside", hanging))
    with tempfile.TemporaryDirectory(prefix="vmprovision-test-") as folder:
        Path(folder).chmod(0o755)  # mmdebstrap of a plain user enters it as other users
        variables = {"TMPDIR": folder, "VMPROVISION_CACHE": str(tmp_path / "cache")}
        with subprocess.Popen(
            [sys.executable, "-m", "vmprovision", "image", "build", "small", "--recipes", tmp_path],
            env={**os.environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        ) as building:
            while not is_run(hanging):
                assert building.poll() is None, building.communicate()[1]
                time.sleep(0.1)
            building.send_signal(signal.SIGTERM)
            errors = building.communicate(timeout=60)[1]
        assert (building.returncode, "cancelled" in errors) == (130, True)
        assert list(Path(folder).iterdir()) == []
    assert not is_run(hanging)
    assert str(tmp_path) not in Path("/proc/mounts").read_text("utf-8")
    assert [path.suffix for path in (tmp_path / "cache/images").iterdir()] == [".lock"]


def with_tarball(folder: Path, members: dict[str, bytes | str | None]) -> tuple[Path, Path]:
    """Make a recipe whose tarball has these members (bytes: a file, text: a link)."""
    tarball = folder / "root.tar.gz"
    with tarfile.open(tarball, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, what in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                member.size = len(what)
            else:
                member.type = tarfile.DIRTYPE if what is None else tarfile.SYMTYPE
                member.linkname = what or ""
            member.mode = 0o755
            archive.addfile(member, io.BytesIO(what) if isinstance(what, bytes) else None)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    named = f'[tarball]\nname = "{tarball.name}"\nsha256 = "{digest}"\n\n[disk]'
    return write_recipe(folder, SMALL.replace("[disk]", named)), tarball


def test_a_tarball_must_be_there_and_be_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing tarball and one with another digest are refused."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    _, tarball = with_tarball(tmp_path, {"etc": None})
    with pytest.raises(RecipeError, match=r"needs root\.tar\.gz") as caught:
        build_image("small", control=Control(), recipes=tmp_path)
    assert "--tarball" in caught.value.hint
    tarball.write_bytes(tarball.read_bytes() + b"\0")
    with pytest.raises(RecipeError, match="is not the tarball of recipe small"):
        build_image("small", control=Control(), recipes=tmp_path, tarball=tmp_path)
    assert [path.suffix for path in (tmp_path / "cache/images").iterdir()] == [".lock"]


@pytest.mark.boot
@pytest.mark.appliance
def test_a_tarball_is_unpacked_where_it_can_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tarball's link that leads out stays a link of the guest; the recipe's files replace it."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    members: dict[str, bytes | str | None] = {
        "etc": None,
        "etc/issue": b"theirs",
        "etc/motd": b"theirs",
        "bin": str(tmp_path),
    }
    folder, _ = with_tarball(tmp_path, members)
    (folder / "files/etc").mkdir(parents=True)
    (folder / "files/etc/motd").write_bytes(b"ours")
    before = sorted(path.name for path in tmp_path.iterdir())
    disk = build_image("small", control=Control(), recipes=tmp_path, tarball=tmp_path)
    after = sorted(path.name for path in tmp_path.iterdir())
    assert after == sorted([*before, "cache"])
    with launch([Drive(path=disk, format="qcow2", readonly=True)], control=Control()) as appliance:
        appliance.call("mount_ro", "/dev/sda1", "/")
        assert appliance.call("read_file", "/etc/issue") == b"theirs"
        assert appliance.call("read_file", "/etc/motd") == b"ours"
        assert appliance.call("is_dir", "/bin")
        assert appliance.call("is_file", "/bin/busybox")


@pytest.mark.boot
@pytest.mark.appliance
@pytest.mark.parametrize("name", ["../../climbed", "out/through"])
def test_a_tarball_that_leads_out_makes_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Names with ".." or through the tarball's own links are refused; nothing is left behind."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    with_tarball(tmp_path, {"out": str(tmp_path), name: b"evil"})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RecipeError, match=r"root\.tar\.gz could not be unpacked"):
        build_image("small", control=Control(), recipes=tmp_path, tarball=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "cache"])
    assert [path.suffix for path in (tmp_path / "cache/images").iterdir()] == [".lock"]


@pytest.mark.boot
def test_two_builders_make_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concurrent builders wait for each other; a copy equals the image; nothing else is left."""
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    write_recipe(tmp_path / "recipes")
    steps: list[str] = []
    made: list[Path] = []
    control = Control(report=lambda progress: steps.append(progress.step))

    def build() -> None:
        made.append(build_image("small", control=control, recipes=tmp_path / "recipes"))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert made[0] == made[1]
    assert steps.count("storing the image in the cache") == 1
    assert sorted(path.suffix for path in made[0].parent.iterdir()) == [".lock", ".qcow2"]

    output = tmp_path / "copy.qcow2"
    build_image("small", output=output, control=control, recipes=tmp_path / "recipes")
    assert output.read_bytes() == made[0].read_bytes()
    assert output.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
