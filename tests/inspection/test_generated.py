"""NixOS and Guix System: known for what they are, refused, with what to do instead."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import OS_RELEASE, SYSTEMD_TREE, Link, Program, Tree, elf, make_tree

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli

NIXOS = "/nix/store/abc-nixos-system-web-23.11.7/init"
GUESTS: dict[str, tuple[str, Tree]] = {
    "nixos that has booted": ("nixos", {"/etc/os-release": "ID=nixos\n", "/etc/NIXOS": ""}),
    # what `nixos-install` leaves, before the first boot
    "nixos that was installed": (
        "nixos",
        {
            "/nix/var/nix/profiles/system": Link("system-1-link"),
            NIXOS: Program(b"#!/nix/store/x-bash/bin/bash\n"),
            "/boot/grub/grub.cfg": f"menuentry 'NixOS' {{\n linux /kernels/k init={NIXOS}\n}}\n",
        },
    ),
    "nixos on an SD card": (
        "nixos",
        {
            "/nix/store/abc": None,
            "/boot/extlinux/extlinux.conf": f"LABEL a\n LINUX /k\n APPEND init={NIXOS} x\n",
        },
    ),
    "nixos with systemd-boot": (
        "nixos",
        {
            "/nix/store/abc": None,
            "/boot/loader/entries/nixos-generation-1.conf": f"title NixOS\noptions init={NIXOS}\n",
        },
    ),
    "nixos of a store alone": ("nixos", {"/nix/store/abc": None, "/nix-path-registration": ""}),
    "guix that has booted": ("guix", {"/etc/os-release": "ID=guix\n", "/gnu/store/abc": None}),
    "guix that was installed": (
        "guix",
        {"/gnu/store/abc-system": None, "/var/guix/profiles/system": Link("system-1-link")},
    ),
    "guix by its menu": (
        "guix",
        {
            "/gnu/store/abc-system": None,
            "/boot/grub/grub.cfg": "menuentry 'GNU with Linux-Libre' {\n linux /gnu/store/k/bzImage"
            " root=x gnu.system=/gnu/store/abc-system gnu.load=/gnu/store/abc-system/boot\n}\n",
        },
    ),
}


@pytest.mark.parametrize("name", GUESTS)
def test_such_a_guest_is_named_and_refused(name: str, tmp_path: Path, run_cli: RunCli) -> None:
    """Inspect says what it is; inject ends with 34 and prints what to add, whatever --init says."""
    expected, files = GUESTS[name]
    make_tree(tmp_path, files)
    guest = vmprovision.inspect(tmp_path)
    assert (guest.distribution.id, guest.init.system) == (expected, None)
    for options in ((), ("--init", "systemd")):
        done = run_cli("inject", tmp_path, "--vm-id", "web-1", *options, check=False)
        assert done.returncode == 34
        assert guest.distribution.product_name in done.stderr
        assert "VM_ID=web-1\n" in done.stdout
        assert done.stdout.startswith("# A NixOS" if expected == "nixos" else ";; A Shepherd")
    assert not (tmp_path / "usr/local").exists()


def test_a_shepherd_in_another_distribution_is_refused_with_its_service(
    tmp_path: Path, run_cli: RunCli
) -> None:
    """Process 1 is recognised by its name, and inject prints what to add to /etc/shepherd.scm."""
    files: Tree = {
        "/etc/os-release": OS_RELEASE,
        "/sbin/init": Link("/usr/bin/shepherd"),
        "/usr/bin/shepherd": Program(b"#!/usr/bin/guile --no-auto-compile\n!#\n"),
    }
    make_tree(tmp_path, files)
    guest = vmprovision.inspect(tmp_path)
    assert (guest.init.system, guest.init.pid1) == (None, "shepherd")
    done = run_cli("inject", tmp_path, "--vm-id", "web-1", check=False)
    assert done.returncode == 34
    assert "/etc/shepherd.scm" in done.stderr
    assert ";;   VM_ID=web-1\n" in done.stdout
    assert done.stdout.rstrip().endswith("(start-in-the-background '(guest-agent))")


def test_the_version_is_in_the_name_of_the_system(tmp_path: Path) -> None:
    """Before the first boot there is no release file, but the system's store path."""
    make_tree(tmp_path, GUESTS["nixos that was installed"][1])
    distribution = vmprovision.inspect(tmp_path).distribution
    assert (distribution.product_name, distribution.version) == ("NixOS", "23.11.7")


@pytest.mark.parametrize("store", ["/nix/store/abc", "/gnu/store/abc"])
def test_the_package_managers_alone_change_nothing(store: str, tmp_path: Path) -> None:
    """Nix and Guix run in any distribution, and have a store and profiles of users there."""
    files: Tree = {
        **SYSTEMD_TREE,
        store: None,
        "/nix/var/nix/profiles/default": Link("default-1-link"),
        "/var/guix/profiles/per-user/root": None,
    }
    assert vmprovision.inspect(make_tree(tmp_path, files)).init.system == "systemd"


def test_no_token_gets_into_the_printed_configuration(tmp_path: Path, run_cli: RunCli) -> None:
    """It would end in a store that everybody may read; with --json the text is in the error."""
    make_tree(tmp_path / "guest", GUESTS["nixos that has booted"][1])
    token = tmp_path / "token"
    token.write_text("s3cret")
    done = run_cli("inject", tmp_path / "guest", "--token-file", token, "--json", check=False)
    found = json.loads(done.stdout)
    assert found["exit_code"] == 34
    assert "systemd.services.guest-agent" in found["error"]["configuration"]
    assert "s3cret" not in done.stdout + done.stderr


def test_usual_guests_have_no_configuration_to_print(tmp_path: Path) -> None:
    """A refusal for another reason prints nothing on standard output."""
    files: Tree = {"/sbin/init": Link("tini"), "/sbin/tini": elf()}
    make_tree(tmp_path, {"/etc/os-release": "ID=odd\n", **files})
    with pytest.raises(vmprovision.UnsupportedGuestError) as caught:
        vmprovision.plan(tmp_path)
    assert caught.value.configuration == ""
