"""A guest whose root is a read-only snapshot is changed in a new one, which then boots."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.stacks import Stack, build_stack, look
from tests.image.trees import Mount, Sight, Tree, differences, look_into
from vmprovision.errors import UnsupportedGuestError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

UUID = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a1305"
RAW = vmprovision.ImageOptions(format="raw")
SUBVOLUMES = ("home", "opt", "root", "srv", "usr/local", "var", ".snapshots")
FSTAB = "\n".join(
    (
        f"UUID={UUID} / btrfs ro 0 0",
        *(f"UUID={UUID} /{each} btrfs subvol=/@/{each} 0 0" for each in SUBVOLUMES),
    )
)
INFO = "<?xml version='1.0'?><snapshot><type>single</type><num>1</num></snapshot>"
LABEL = "system_u:object_r:snapperd_data_t:s0"
# As openSUSE MicroOS is installed.
MAKE = f"""
sfdisk -q $A <<'X'
label: gpt
size=1MiB,type=21686148-6449-6E6F-744E-656564454649
type=L
X
udevadm settle
mkfs.btrfs -q -U {UUID} ${{A}}2
mount ${{A}}2 /sysroot
cd /sysroot
btrfs -q subvolume create @
mkdir @/usr
for each in {" ".join(SUBVOLUMES)}; do btrfs -q subvolume create @/$each; done
mkdir @/.snapshots/1
btrfs -q subvolume create @/.snapshots/1/snapshot
echo "{INFO}" >@/.snapshots/1/info.xml
setfattr -n security.selinux -v {LABEL} @/.snapshots/1 @/.snapshots/1/info.xml
btrfs subvolume set-default @/.snapshots/1/snapshot
cd /
umount /sysroot
mount ${{A}}2 /sysroot
before
for each in {" ".join(SUBVOLUMES)}; do
    mkdir -p /sysroot/$each
    mount -o subvol=@/$each ${{A}}2 /sysroot/$each
done
guest <<'X'
{FSTAB}
MORE
X
after
for each in {" ".join(SUBVOLUMES)}; do umount /sysroot/$each; done
btrfs property set -ts /sysroot ro true
"""
# The agent's files below /usr/local and /var are in subvolumes that all snapshots share.
SHARED = ("/usr/local/", "/var/")
OVERLAY = (
    "overlay /etc overlay defaults,lowerdir=/sysroot/etc,"
    "upperdir=/sysroot/var/lib/overlay/1/etc,workdir=/sysroot/var/lib/overlay/1/work-etc,"
    "x-systemd.requires-mounts-for=/sysroot/var,x-initrd.mount 0 0"
)


def layout(*, more: str = "", before: str = ":", after: str = ":") -> Stack:
    """Return the disk: with more lines of fstab, and scripts before and after the files."""
    script = MAKE.replace("MORE", more)
    script = script.replace("\nbefore\n", f"\n{before}\n").replace("\nafter\n", f"\n{after}\n")
    return Stack(script=script, sizes_mb=(256,))


PLAIN = layout()
# Since version 5 of transactional-update; 1 waits for its first boot.
NESTED = layout(
    more="/etc /etc none bind,x-initrd.mount 0 0",
    before="btrfs -q subvolume create /sysroot/etc",
    after="btrfs -q subvolume snapshot /sysroot/etc /sysroot/etc/etc.syncpoint",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The state of the disk.

    Attributes:
        default: the path of the default subvolume.
        read_only: the snapshots that are read-only.
        trees: of each snapshot, with everything that fstab mounts.
    """

    default: str
    read_only: list[str]
    trees: dict[int, Tree]


def see(disk: Path, scratch: Path, numbers: tuple[int, ...]) -> Seen:
    """Return the state of a disk with these snapshots."""
    script = (
        "mount -o ro,subvolid=5 /dev/sda2 /sysroot; "
        "btrfs subvolume get-default /sysroot | cut -d' ' -f9; "
        "for each in /sysroot/@/.snapshots/*/snapshot; do "
        "case $(btrfs property get -ts $each ro) in ro=true) echo $each;; esac; done; "
        "umount /sysroot"
    )
    default, *read_only = look([disk], script).split()
    trees = {}
    for number in numbers:
        mounts = [
            Mount(device="2", options=f"subvol=@/.snapshots/{number}/snapshot"),
            *(Mount(device="2", at=f"/{each}", options=f"subvol=@/{each}") for each in SUBVOLUMES),
        ]
        tree = look_into(Sight(path=disk, format="raw", mounts=mounts), scratch)
        trees[number] = {
            path: stands for path, stands in tree.items() if not path.startswith("/.snapshots")
        }
    return Seen(default=default, read_only=read_only, trees=trees)


def snapshot(number: int) -> str:
    """Return the path of a snapshot below the top level."""
    return f"@/.snapshots/{number}/snapshot"


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(NESTED, id="nested-etc", marks=pytest.mark.slow),
    ],
)
def test_injected_and_removed(stack: Stack, tmp_path: Path) -> None:
    """The old snapshot stays as it was; the new one has the plan's changes, and boots."""
    (disk,) = build_stack(tmp_path, stack)
    before = see(disk, tmp_path, (1,))
    inspected = vmprovision.inspect(disk, source=RAW)
    assert "an injection is made in a new one" in " ".join(inspected.notes)

    report = vmprovision.inject(disk, vmprovision.InjectOptions(vm_id="web-1"), source=RAW)
    assert report.guest.mountpoints["/"] == f"btrfsvol:/dev/sda2/{snapshot(2)}"
    after = see(disk, tmp_path, (1, 2))
    assert after.default == snapshot(2)
    assert after.read_only == [f"/sysroot/{snapshot(number)}" for number in (1, 2)]
    changed = {str(path) for path in report.changed}
    assert set(differences(before.trees[1], after.trees[2])) == changed
    kept = {path for path in changed if path.startswith(SHARED)}
    assert changed - kept, "nothing is in the snapshot itself"
    assert set(differences(before.trees[1], after.trees[1])) == kept
    check_description(disk)

    content = digest(disk)
    assert vmprovision.verify(disk, source=RAW).mismatches == ()
    assert (
        vmprovision.inject(disk, vmprovision.InjectOptions(vm_id="web-1"), source=RAW).changed == ()
    )
    assert digest(disk) == content, "a second injection wrote"

    vmprovision.remove(disk, source=RAW)
    last = see(disk, tmp_path, (1, 3))
    assert last.default == snapshot(3)
    assert last.read_only == [f"/sysroot/{snapshot(number)}" for number in (1, 2, 3)]
    assert differences(before.trees[1], last.trees[3]) == {}
    assert differences(before.trees[1], last.trees[1]) == {}


def check_description(disk: Path) -> None:
    """Check that snapper finds the new snapshot, with the labels of the old one."""
    script = (
        "mount -o ro,subvolid=5 /dev/sda2 /sysroot; cd /sysroot/@/.snapshots; cat 2/info.xml; "
        "for each in 2 2/info.xml; do getfattr --only-values -n security.selinux $each; echo; "
        "stat -c '%a %u %g' $each; done; cd /; umount /sysroot"
    )
    said = look([disk], script)
    for line in ("<type>single</type>", "<num>2</num>", "<cleanup>number</cleanup>"):
        assert line in said
    assert said.count(LABEL) == 2
    assert said.split("</snapshot>")[1].split() == [LABEL, "755", "0", "0", LABEL, "644", "0", "0"]


def digest(disk: Path) -> str:
    """Return the hash of a disk."""
    return hashlib.sha256(disk.read_bytes()).hexdigest()


def test_a_copy_without_a_change_has_no_new_snapshot(tmp_path: Path) -> None:
    """``--output`` copies a guest that needs no change, with the snapshots that it has."""
    (disk,) = build_stack(tmp_path, PLAIN)
    vmprovision.inject(disk, source=RAW)
    copy = tmp_path / "copy.raw"
    assert vmprovision.inject(disk, source=RAW, output=copy).changed == ()
    seen = see(copy, tmp_path, (1, 2))
    assert seen.default == snapshot(2)
    assert seen.read_only == [f"/sysroot/{snapshot(number)}" for number in (1, 2)]


ENTRY = f"""\
/sysroot/boot/grub2/grub.cfg <<'END'
menuentry a {{ linux /v root=UUID={UUID} rootflags=subvol=@/.snapshots/1/snapshot; }}
END"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "says"),
    [
        (layout(after=f"mkdir -p /sysroot/boot/grub2; cat >{ENTRY}"), "the boot menu names it"),
        (layout(more=OVERLAY), "would be hidden in the running guest"),
        (
            Stack(
                script="mkfs.btrfs -q $A\nmount $A /sysroot\n"
                "btrfs -q subvolume create /sysroot/@\nbtrfs subvolume set-default /sysroot/@\n"
                "umount /sysroot\nmount $A /sysroot\necho | guest\n"
                "btrfs property set -ts /sysroot ro true\n",
                sizes_mb=(256,),
            ),
            "snapper does not manage it",
        ),
    ],
    ids=["named", "overlay", "no-snapper"],
)
def test_refused(stack: Stack, says: str, tmp_path: Path) -> None:
    """If a new snapshot would not boot, or not show the change, the image stays as it is."""
    (disk,) = build_stack(tmp_path, stack)
    content = digest(disk)
    with pytest.raises(UnsupportedGuestError) as raised:
        vmprovision.inject(disk, source=RAW)
    assert says in raised.value.message
    assert digest(disk) == content
    vmprovision.inspect(disk, source=RAW)
