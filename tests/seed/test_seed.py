"""Seeds without a boot: what is in them, for whom, and what is refused."""

from __future__ import annotations

import base64
import email
import gzip
import json
import shutil
import subprocess
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.agent.interpreters import MICROPYTHON, get_interpreter
from tests.conftest import require
from tests.trees import SYSTEMD_TREE, Link, Tree, elf, make_tree, tree_state
from vmprovision import InjectOptions, SeedOptions, make_seed
from vmprovision.changes.receipt import RECEIPT, parse_receipt
from vmprovision.filesystem.local import LocalFilesystem

if TYPE_CHECKING:
    from tests.conftest import RunCli
    from vmprovision.seed.make import SeedKind

CLOUD_TREE: Tree = {**SYSTEMD_TREE, "/usr/bin/cloud-init": "#!/usr/bin/python3\n"}
OPENRC_TREE: Tree = {
    "/etc/os-release": "ID=alpine\n",
    "/etc/inittab": "::sysinit:/sbin/openrc sysinit\n::wait:/sbin/openrc default\n",
    "/sbin/openrc": elf(),
    "/sbin/init": Link("/bin/busybox"),
    "/bin/busybox": elf(content=b"BusyBox v1.35.0"),
    "/sbin/openrc-run": elf(),
    "/etc/runlevels/default": None,
    "/usr/bin/cloud-init": "#!/usr/bin/python3\n",
    **{path: what for path, what in SYSTEMD_TREE.items() if "python" in path},
}
UNSEEN = InjectOptions(vm_id="web-1", manager_url="http://192.0.2.1:3000", init="systemd")


def read_iso(path: Path, folder: Path) -> dict[str, str]:
    """Unpack an ISO image with xorriso, and give its files."""
    require(shutil.which("xorriso"), "xorriso is not installed")
    command = ["xorriso", "-osirrox", "on", "-indev", str(path), "-extract", "/", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return {each.name: each.read_text("ascii") for each in folder.iterdir()}


def cloud_config(text: str) -> dict[str, Any]:
    """Give a cloud-config document as what it says."""
    head, _, body = text.partition("\n")
    assert head == "#cloud-config"
    found: dict[str, Any] = json.loads(body)
    return found


def carry_out(config: dict[str, Any], root: Path) -> None:
    """Do in a directory what cloud-init does with the files and links of a document.

    Its own base64 and gzip decoding, permissions and parents; commands by a real shell.
    """
    for file in config["write_files"]:
        assert (file["encoding"], file["owner"]) == ("gz+b64", "root:root")
        path = root / file["path"].lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(base64.b64decode(file["content"])))
        path.chmod(int(file["permissions"], 8))
    for command in config["runcmd"]:
        if command[0] in ("mkdir", "ln"):
            command[-1] = str(root) + command[-1]
            subprocess.run(command, check=True)


def assert_receipt_holds(root: Path) -> None:
    """Check that all which the receipt in a directory names is there."""
    reader = LocalFilesystem(root)
    receipt = parse_receipt(reader.read(RECEIPT, limit=1 << 20))
    assert len(receipt.entries) >= 5
    assert [m for each in receipt.entries for m in each.condition.mismatches(reader)] == []


def test_a_cloud_init_guest_gets_an_iso_with_the_plan(tmp_path: Path) -> None:
    """The documents make what their receipt states; the guest is only read."""
    root, iso = make_tree(tmp_path / "root", CLOUD_TREE), tmp_path / "seed.iso"
    before = tree_state(root)
    report = make_seed(root, iso, InjectOptions(vm_id="web-1"))
    assert report.kind == "cloud-init"
    assert tree_state(root) == before
    assert iso.stat().st_mode & 0o777 == 0o600
    blkid = ["/sbin/blkid", "-p", "-s", "LABEL", "-o", "value", str(iso)]
    assert subprocess.run(blkid, capture_output=True, check=True).stdout == b"cidata\n"

    files = read_iso(iso, tmp_path / "files")
    assert json.loads(files["meta-data"]) == {"instance-id": "web-1"}
    config = cloud_config(files["user-data"])
    assert config["runcmd"][-2:] == [
        ["systemctl", "daemon-reload"],
        ["systemctl", "restart", "guest-agent"],
    ]
    carry_out(config, root)
    assert_receipt_holds(root)
    assert vmprovision.verify(root).mismatches == ()
    vmprovision.remove(root)
    assert not (root / "usr/local/lib/guest-agent").exists()


def test_a_machine_without_a_name_gets_none_from_the_seed(tmp_path: Path) -> None:
    """A seed that serves several machines says nothing that the agent would take for a name."""
    make_seed(None, tmp_path, InjectOptions(init="systemd"), seed=SeedOptions(kind="cloud-init"))
    assert json.loads((tmp_path / "meta-data").read_text()) == {"instance-id": "nocloud"}


def test_an_openrc_guest_is_started_by_openrc(tmp_path: Path) -> None:
    """The script and its link are written, and rc-service starts it."""
    root = make_tree(tmp_path / "root", OPENRC_TREE)
    (tmp_path / "seed").mkdir()
    make_seed(root, tmp_path / "seed")
    config = cloud_config((tmp_path / "seed/user-data").read_text())
    assert config["runcmd"][-1] == ["rc-service", "guest-agent", "restart"]
    carry_out(config, root)
    assert (root / "etc/runlevels/default/guest-agent").is_symlink()
    assert_receipt_holds(root)


def test_the_callers_own_user_data_stays(tmp_path: Path) -> None:
    """Both documents are parts of one MIME message, ours last, and its lists are appended."""
    own = "#cloud-config\nruncmd: [[touch, /own]]\n# größer\n"
    seed = SeedOptions(kind="cloud-init", user_data=own.encode())
    make_seed(None, tmp_path, UNSEEN, seed=seed)
    parts = parse_mime((tmp_path / "user-data").read_bytes())
    assert parts[0] == ("text/plain", own)
    assert parts[1][0] == "text/cloud-config"
    merge = cloud_config(parts[1][1])["merge_how"]
    assert merge == "list(append)+dict(no_replace,recurse_list)+str()"


def parse_mime(content: bytes) -> list[tuple[str, str]]:
    """Give the type and text of each part, by the library that cloud-init uses."""
    message = email.message_from_bytes(content)
    assert message.is_multipart()
    return [
        (part.get_content_type(), bytes(part.get_payload(decode=True)).decode("utf-8"))
        for part in message.walk()
        if not part.is_multipart()
    ]


def test_user_data_that_is_mime_already_gets_one_more_part(tmp_path: Path) -> None:
    """The parts that the caller has joined stay parts of the one message."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, data in ((first, b"#!/bin/sh\ntrue\n"), (second, b"")):
        folder.mkdir()
        given = data or (first / "user-data").read_bytes()
        seed = SeedOptions(kind="cloud-init", user_data=given)
        make_seed(None, folder, UNSEEN, seed=seed)
    kinds = [kind for kind, _ in parse_mime((second / "user-data").read_bytes())]
    assert kinds == ["text/plain", "text/cloud-config", "text/cloud-config"]


def test_ignition_accepts_its_configuration(tmp_path: Path) -> None:
    """ignition-validate finds no fault; what it writes is what the receipt says."""
    require(shutil.which("ignition-validate"), "ignition is not installed")
    output = tmp_path / "config.ign"
    runtime = Path(get_interpreter(MICROPYTHON).argv[0])
    options = InjectOptions(vm_id="web-1", runtime=runtime)
    report = make_seed(None, output, options, seed=SeedOptions(kind="ignition", arch="x86_64"))
    subprocess.run(["ignition-validate", str(output)], check=True)
    root = tmp_path / "root"
    storage = json.loads(output.read_text())["storage"]
    for file in storage["files"]:
        path = root / file["path"].lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = file["contents"]["source"].removeprefix("data:;base64,")
        path.write_bytes(gzip.decompress(base64.b64decode(packed)))
        path.chmod(file["mode"])
    for link in storage["links"]:
        path = root / link["path"].lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(link["target"])
    assert_receipt_holds(root)
    assert "/usr/local/lib/guest-agent/python" in report.paths


def test_strings_name_a_machine_to_the_agent_in_its_image(tmp_path: Path, run_cli: RunCli) -> None:
    """They are printed, one a line, as the agent and systemd read them."""
    words = ("--vm-id", "web-1", "--manager-url", "http://192.0.2.1:3000")
    done = run_cli("seed", "--for", "smbios", *words)
    names = ("guest_agent.vm_id=web-1", "guest_agent.manager_url=http://192.0.2.1:3000")
    assert tuple(done.stdout.splitlines()) == names
    done = run_cli("seed", "--for", "credentials", *words, "--json")
    strings = json.loads(done.stdout)["strings"]
    assert strings == [f"io.systemd.credential:{name}" for name in names]
    root = make_tree(tmp_path / "root", SYSTEMD_TREE)
    assert run_cli("seed", root, "--for", "smbios", *words, check=False).returncode == 40
    vmprovision.inject(root)
    assert run_cli("seed", root, "--for", "smbios", *words).stdout == done_lines(names)


def done_lines(names: tuple[str, ...]) -> str:
    """Give what prints these lines."""
    return "".join(f"{name}\n" for name in names)


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ({}, None, "no cloud-init or Ignition"),
        ({}, "ignition", "no ignition"),
        (CLOUD_TREE, "ignition", "no ignition"),
        (
            {**CLOUD_TREE, "/etc/cloud/cloud-init.disabled": ""},
            None,
            "/etc/cloud/cloud-init.disabled",
        ),
        (
            {
                **CLOUD_TREE,
                "/etc/cloud/cloud.cfg": "datasource_list: [ NoCloud, None ]\n",
                "/etc/cloud/cloud.cfg.d/90.cfg": "datasource_list: [ 'Ec2', None ]\n",
            },
            None,
            "90.cfg leaves NoCloud out",
        ),
    ],
)
def test_a_guest_that_would_read_no_seed_is_refused(
    files: Tree, kind: SeedKind | None, message: str, tmp_path: Path
) -> None:
    """The cause is named, and nothing is written."""
    root = make_tree(tmp_path / "guest", {**SYSTEMD_TREE, **files})
    with pytest.raises(vmprovision.UnsupportedGuestError, match=message) as caught:
        make_seed(root, tmp_path / "s.iso", seed=SeedOptions(kind=kind))
    assert "vmprovision inject" in caught.value.hint
    assert not (tmp_path / "s.iso").exists()


@pytest.mark.parametrize(
    ("options", "seed", "missing"),
    [
        (InjectOptions(), SeedOptions(), "--for"),
        (InjectOptions(), SeedOptions(kind="cloud-init"), "--init"),
        (InjectOptions(init="sysv"), SeedOptions(kind="cloud-init"), "--init"),
        (InjectOptions(), SeedOptions(kind="ignition"), "--arch"),
        (InjectOptions(init="openrc"), SeedOptions(kind="ignition", arch="x86_64"), "systemd"),
        (InjectOptions(), SeedOptions(kind="smbios"), "--vm-id"),
        (InjectOptions(vm_id="a", port=80), SeedOptions(kind="smbios"), "can hold only"),
        (UNSEEN, SeedOptions(kind="ignition", user_data=b"x"), "--user-data"),
        (UNSEEN, SeedOptions(kind="cloud-init", user_data=b"\xff"), "UTF-8"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: InjectOptions, seed: SeedOptions, missing: str, tmp_path: Path
) -> None:
    """The message or the hint names what is missing, or too much."""
    with pytest.raises(vmprovision.VmprovisionError) as caught:
        make_seed(None, tmp_path / "new", options, seed=seed)
    assert missing in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--for", "windows"), 40, "no seed for windows"),
        (("--for", "cloud-init", "--user-data", "missing"), 40, "cannot be read"),
        (("--for", "cloud-init", "--init", "systemd", "-o", "taken"), 10, "exists already"),
    ],
)
def test_the_command_ends_with_the_documented_code(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, run_cli: RunCli
) -> None:
    """One clear error, and a file that was there stays."""
    (tmp_path / "taken").write_text("mine")
    done = run_cli("seed", *words, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_guest_that_has_an_agent_needs_no_seed(tmp_path: Path) -> None:
    """It is told apart, and what to do is named."""
    root = make_tree(tmp_path / "root", CLOUD_TREE)
    vmprovision.inject(root)
    with pytest.raises(vmprovision.PlanError, match="has agent") as caught:
        make_seed(root, tmp_path / "seed.iso")
    assert "--for smbios" in caught.value.hint


def test_the_configuration_of_a_token_is_private_in_the_guest(tmp_path: Path) -> None:
    """Its permissions are in the seed."""
    options = InjectOptions(init="systemd", token="secret")
    make_seed(None, tmp_path, options, seed=SeedOptions(kind="cloud-init"))
    config = cloud_config((tmp_path / "user-data").read_text())
    modes = {PurePosixPath(f["path"]): f["permissions"] for f in config["write_files"]}
    assert modes[PurePosixPath("/etc/guest-agent.conf")] == "0600"
