"""Which entry of a boot menu starts the guest, and with which ``init=``."""

from __future__ import annotations

import struct
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import OS_RELEASE, Link, Program, Tree, elf, make_tree, python_tree
from vmprovision.errors import AmbiguousInitError
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.bootmenu import init_option, read_boot_menus

if TYPE_CHECKING:
    from pathlib import Path

SYSTEMD, RUNIT = "/lib/systemd/systemd", "/sbin/runit-init"
# Three init systems: /sbin/init is sysvinit's.
THREE: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/etc/inittab": "l2:2:wait:/etc/init.d/rc 2\n",
    "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
    SYSTEMD: elf(),
    RUNIT: elf(),
    "/etc/runit/runsvdir/default": None,
    "/bin/sh": elf(),
    **python_tree(),
}
# As update-grub writes it where several init systems are installed.
GRUB = f"""\
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
else
   set default="DEFAULT"
fi
function savedefault {{
  save_env saved_entry
}}
menuentry 'Debian' --class debian $menuentry_id_option 'gnulinux-simple-1' {{
\tlinux /vmlinuz root=/dev/vda1 ro quiet
}}
submenu 'Advanced options' $menuentry_id_option 'advanced' {{
\tmenuentry 'Debian, with systemd' $menuentry_id_option 'with-systemd' {{
\t\tlinux /vmlinuz root=/dev/vda1 ro init={SYSTEMD}
\t}}
\tmenuentry 'Debian, with runit' $menuentry_id_option 'with-runit' {{
\t\tlinux /vmlinuz root=/dev/vda1 ro init={RUNIT}
\t}}
}}
menuentry 'UEFI Firmware Settings' {{
\tfwsetup
}}
"""
LEGACY = f"default DEFAULT\ntitle A\nkernel /v root=x\ntitle B\nkernel /v init={SYSTEMD} x\n"
EXTLINUX = (
    "LABEL a\n LINUX /v\n APPEND root=x\nLABEL b\nMARK LINUX /v\n APPEND root=x init=" + RUNIT
)
TITLED = (
    f"LABEL Debian 13 (0)\n LINUX /v\n APPEND root=x init={RUNIT}\n"
    "LABEL Debian 13 (1)\n LINUX /v\n APPEND root=x\n"
)
ENTRIES: Tree = {
    "/boot/loader/entries/a-1.conf": f"title A\nlinux /v\noptions root=x init={SYSTEMD}\n",
    "/boot/loader/entries/b-2.conf": "title B\nlinux /v\noptions root=x $kernelopts\n",
}


def unified_image(options: str) -> bytes:
    """Return a PE file whose section ``.cmdline`` holds these options."""
    line = options.encode() + b"\0"
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 2, 0, 0, 0, 16, 0)
    sections = b"".join(
        name.ljust(8, b"\0") + struct.pack("<IIII", len(line), 0, 512, place) + bytes(16)
        for name, place in ((b".osrel", 512), (b".cmdline", 1024))
    )
    return (head + coff + bytes(16) + sections).ljust(1024, b"\0") + line


def grub(default: str, **more: str) -> Tree:
    """Return a guest with GRUB whose default is this."""
    return {"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", default), **more}


def environment(text: str, folder: str = "grub") -> Tree:
    """Return a guest with this in grubenv."""
    return {f"/boot/{folder}/grubenv": f"# GRUB Environment Block\n{text}\n#####"}


@pytest.mark.parametrize(
    ("files", "program"),
    [
        (grub("0"), "sysvinit"),
        (grub("1>0"), "systemd"),
        (grub("advanced>with-runit"), "runit"),
        (grub("Advanced options>Debian, with systemd"), "systemd"),
        (grub("${saved_entry}"), "sysvinit"),
        ({**grub("${saved_entry}"), **environment("saved_entry=1>1")}, "runit"),
        ({**grub("0"), **environment("next_entry=1>1")}, "sysvinit"),
        ({"/boot/grub/menu.lst": LEGACY.replace("DEFAULT", "0")}, "sysvinit"),
        ({"/boot/grub/grub.conf": LEGACY.replace(" DEFAULT", "=1")}, "systemd"),
        ({"/boot/extlinux/extlinux.conf": "DEFAULT a\n" + EXTLINUX}, "sysvinit"),
        ({"/boot/extlinux/extlinux.conf": "DEFAULT b\n" + EXTLINUX}, "runit"),
        ({"/boot/extlinux.conf": "DEFAULT menu.c32\n" + EXTLINUX}, "sysvinit"),
        # as ostree writes it
        ({"/boot/syslinux/syslinux.cfg": "DEFAULT Debian 13 (0)\n" + TITLED}, "runit"),
        (
            {"/extlinux.conf": "DEFAULT menu.c32\n" + EXTLINUX.replace("MARK", " MENU DEFAULT\n")},
            "runit",
        ),
        ({"/boot/syslinux/syslinux.cfg": f"APPEND init={RUNIT}\nLABEL a\n LINUX /v\n"}, "runit"),
        ({**ENTRIES, "/boot/loader/loader.conf": "default a-*\n"}, "systemd"),
        ({**ENTRIES, **environment("saved_entry=b-2", "grub2")}, "sysvinit"),
        (
            {**ENTRIES, **environment(f"saved_entry=b-2\nkernelopts=ro init={RUNIT}", "grub2")},
            "runit",
        ),
        ({"/etc/default/grub": f'GRUB_CMDLINE_LINUX="quiet init={SYSTEMD}"\n'}, "systemd"),
        ({"/etc/default/grub": f'#GRUB_CMDLINE_LINUX="init={SYSTEMD}"\n'}, "sysvinit"),
        ({"/etc/kernel/cmdline": f"root=x init={RUNIT}\n"}, "runit"),
        ({**grub("0"), "/etc/default/grub": f'GRUB_CMDLINE_LINUX="init={SYSTEMD}"\n'}, "sysvinit"),
        ({"/boot/efi/EFI/fedora/grub.cfg": GRUB.replace("DEFAULT", "1>1")}, "runit"),
        # two loaders, one answer
        ({**grub("0"), "/boot/grub/menu.lst": "title A\nkernel /v init=/sbin/init\n"}, "sysvinit"),
    ],
)
def test_the_default_entry_decides(files: Tree, program: str, tmp_path: Path) -> None:
    """By number, title or identifier, through submenus, as it was saved, or the first."""
    guest = vmprovision.inspect(make_tree(tmp_path, {**THREE, **files}))
    assert guest.init.pid1 == program
    assert guest.init.system == {"sysvinit": "sysv"}.get(program, program)


@pytest.mark.parametrize(
    "files",
    [
        grub("an entry that is gone"),
        {"/boot/grub/menu.lst": LEGACY.replace("DEFAULT", "saved")},
        ENTRIES,
        {**grub("0"), "/boot/grub/menu.lst": f"title A\nkernel /v init={SYSTEMD}\n"},
        # syslinux starts the first of these, U-Boot the second
        {"/boot/extlinux/extlinux.conf": "DEFAULT Debian 13 (1)\n" + TITLED},
    ],
)
def test_a_menu_that_does_not_decide_is_never_guessed(files: Tree, tmp_path: Path) -> None:
    """Entries or loaders that differ, and no telling which is used: exit 33, naming --init."""
    make_tree(tmp_path, {**THREE, **files})
    with pytest.raises(AmbiguousInitError, match="do not agree") as caught:
        vmprovision.plan(tmp_path)
    assert "--init" in caught.value.hint
    told = vmprovision.InjectOptions(init="sysv")
    assert vmprovision.plan(tmp_path, told).guest.init.system == "sysv"


RUN = f"init={RUNIT}"
ONE_LINE = f"menuentry 'a' {{ linux /v root=x {RUN}; initrd /i; }}"


@pytest.mark.parametrize(
    "script",
    [
        ONE_LINE,
        f"menuentry 'a' --class x {{ linux /v \\\n  root=x \\\n  {RUN}\n}}\n",
        f'set o="quiet {RUN}"\nmenuentry "a" {{\n linux /v ${{o}}\n}}\n',
        f"o={RUN}\np='ro '$o\nmenuentry a {{\n linux16 /v $p\n}}\n",
        f"menuentry a {{\n linuxefi /v in\\it={RUNIT}\n}}\n",
        f"menuentry a {{\n if [ x$y = x ]; then linux /v '{RUN}'; else linux /v; fi\n}}\n",
        f"function load {{\n linux /v $1\n}}\nmenuentry a {{\n load {RUN}\n}}\n",
        f'for i in {RUNIT}; do menuentry "$i" $i {{ linux /v init=$2; }}; done',
        f"if true; then\n {ONE_LINE}\nelse\n menuentry b {{ linux /v; }}\nfi\n",
        f"menuentry b {{ linux /v; }}\n{ONE_LINE}\ndefault=1\n",
        f"menuentry b {{ linux /v; }}\n{ONE_LINE}\nset wanted=a\nset default=$wanted\n",
        f"set default='x>>y'\nmenuentry b {{ linux /v; }}\nmenuentry 'x>y' {{ linux /v {RUN}; }}",
        f"# menuentry no {{\nmenuentry a {{ # }}\n linux /v {RUN} # init=/no\n}}\n",
        f"eval 'menuentry a {{ linux /v {RUN}; }}'\n",
        f"menuentry xen {{ multiboot2 /xen.gz; module2 /v root=x {RUN}; }}",
        f"linux /v {RUN}\nboot\n",
    ],
)
def test_grub_scripts_are_followed(script: str, tmp_path: Path) -> None:
    """One line or several, variables, functions, conditions and loops, as GRUB takes them."""
    make_tree(tmp_path, {**THREE, "/boot/grub/grub.cfg": script})
    found = vmprovision.inspect(tmp_path).init
    assert (found.system, found.confidence) == ("runit", "certain")


@pytest.mark.parametrize(
    "files",
    [
        {
            "/boot/grub/grub.cfg": "if [ -f $prefix/custom.cfg ]; then\n"
            " source $prefix/custom.cfg\nfi\n",
            "/boot/grub/custom.cfg": ONE_LINE,
        },
        {  # as Debian's image of a boot loader has it, with a /boot of its own
            "/boot/efi/EFI/debian/grub.cfg": "search.fs_uuid 7c1d root hd0,gpt2\n"
            "set prefix=($root)'/grub'\nconfigfile $prefix/grub.cfg\n",
            "/boot/grub/grub.cfg": ONE_LINE,
        },
        {  # the same on btrfs, where paths begin above the subvolumes
            "/boot/efi/EFI/debian/grub.cfg": "search.fs_uuid 7c1d root hd0,gpt3\n"
            "set prefix=($root)'/@/boot/grub'\nconfigfile $prefix/grub.cfg\n",
            "/etc/fstab": "UUID=7c1d / btrfs defaults,subvol=/@ 0 0\n",
            "/boot/grub/grub.cfg": ONE_LINE,
        },
        {  # and with a subvolume of its own for /boot
            "/boot/efi/EFI/debian/grub.cfg": "configfile ($root)/@/boot/grub/grub.cfg\n",
            "/etc/fstab": "/dev/vda3 / btrfs subvol=@root 0 0\n"
            "/dev/vda3 /boot btrfs subvol=@/boot 0 0\n",
            "/boot/grub/grub.cfg": ONE_LINE,
        },
        {
            "/boot/grub/grub.cfg": "menuentry more { configfile /boot/grub/more.cfg; }\n",
            "/boot/grub/more.cfg": ONE_LINE,
        },
        {
            "/boot/grub/grub.cfg": ". /boot/grub/settings\nmenuentry a { linux /v $o; }\n",
            "/boot/grub/settings": f"set o={RUN}\n",
        },
        {
            "/boot/grub/grub.cfg": "load_env -f $prefix/other\nmenuentry a { linux /v $o; }\n",
            "/boot/grub/other": f"# GRUB Environment Block\no={RUN}\n####",
        },
        {
            "/boot/extlinux/extlinux.conf": "DEFAULT b\nINCLUDE more.conf\n",
            "/boot/extlinux/more.conf": EXTLINUX.replace("MARK", ""),
        },
        {
            "/boot/syslinux/syslinux.cfg": "UI menu.c32\nMENU INCLUDE /syslinux/more.conf\n",
            "/boot/syslinux/more.conf": f"LABEL a\n KERNEL /v\n APPEND {RUN}\n",
        },
        {"/extlinux.conf": f"DEFAULT /v root=x {RUN}\n"},
        {"/etc/lilo.conf": f'image=/v\n label=a\n append = "ro {RUN}"\n'},
        {"/etc/lilo.conf": f"default=b\nimage=/v\n label=a\nimage=/w\n label=b\n literal={RUN}"},
        {"/etc/lilo.conf": f"append='{RUN}'\nimage=/v\n label=a\n"},
        {"/boot/cmdline.txt": f"console=tty1 root=x {RUN} rootwait\n"},
        {"/boot/firmware/cmdline.txt": f"root=x {RUN}\n", "/boot/cmdline.txt": ""},
        {
            "/boot/config.txt": "[all]\ncmdline=other.txt\n",
            "/boot/cmdline.txt": "root=x\n",
            "/boot/other.txt": f"root=x {RUN}\n",
        },
        {
            "/etc/default/grub": "GRUB_CMDLINE_LINUX=quiet\n",
            "/etc/default/grub.d/50-x.cfg": f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {RUN}"\n',
        },
        {"/boot/armbianEnv.txt": f"verbosity=1\nextraargs={RUN}\n"},
        {"/boot/efi/EFI/Linux/a.efi": unified_image(f"root=x {RUN}")},
    ],
)
def test_all_that_a_menu_takes_in_is_read(files: Tree, tmp_path: Path) -> None:
    """Other files of the same boot loader, and the menus of other boot loaders."""
    found = vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init
    assert (found.system, found.confidence) == ("runit", "certain")


def test_an_init_for_the_first_boot_only_is_passed_over(tmp_path: Path) -> None:
    """Raspberry Pi OS resizes itself by an init= that it then takes out of cmdline.txt."""
    once = Program(b"#!/bin/sh\nsed -i 's| init=/usr/lib/once||' /boot/cmdline.txt\nreboot -f\n")
    files: Tree = {"/boot/cmdline.txt": "root=x init=/usr/lib/once\n", "/usr/lib/once": once}
    found = vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init
    assert (found.system, found.confidence) == ("sysv", "certain")
    assert "/usr/lib/once runs once and removes itself from the command line" in found.evidence


@pytest.mark.parametrize(
    "files",
    [
        {"/boot/grub/grub.cfg": "configfile (hd1,gpt2)/grub.cfg\n"},
        {"/boot/grub/grub.cfg": GRUB.replace("DEFAULT", "0") + "source (hd1,1)/grub/x.cfg\n"},
        {"/boot/grub/grub.cfg": "read line\nmenuentry a { linux /v $line; }\n"},
        {"/boot/grub/grub.cfg": "smbios -t 1 --set x\nmenuentry a { linux /v init=$x; }\n"},
        {"/boot/grub/grub.cfg": f"if hwmatch a; then o={RUN}; fi\nmenuentry a {{ linux /v $o; }}"},
        {"/boot/grub/grub.cfg": f"if hwmatch a; then {ONE_LINE}; fi\nmenuentry b {{ linux /v; }}"},
        {"/boot/grub/grub.cfg": "extract_legacy_entries_source /menu.lst\n"},
        {"/boot/grub/grub.cfg": ONE_LINE + "#" * (1 << 20)},
        {"/boot/extlinux/extlinux.conf": "INCLUDE /gone.conf\nLABEL a\n LINUX /v\n"},
        {"/boot/extlinux/extlinux.conf": "LABEL a\n CONFIG /other.conf\n"},
        {
            "/boot/config.txt": "[pi4]\ncmdline=a\n[pi5]\ncmdline=b\n",
            "/boot/a": RUN,
            "/boot/b": "x",
        },
    ],
)
def test_what_is_not_understood_is_a_doubt(files: Tree, tmp_path: Path) -> None:
    """Where it may name another init, nothing is certain by not being read."""
    make_tree(tmp_path, {**THREE, **files})
    found = vmprovision.inspect(tmp_path).init
    assert (found.system, found.confidence) == (None, "unknown")
    assert found.doubt
    with pytest.raises(AmbiguousInitError):
        vmprovision.plan(tmp_path)


@pytest.mark.parametrize(
    "script",
    [
        "probe -u $root --set=id\nmenuentry a { linux /v root=UUID=$id ro; }\n",
        "if loadfont x; then set gfx=keep; else set gfx=text; fi\nmenuentry a { linux /v $gfx; }",
        "menuentry a { linux /v $extra_cmdline $tuned_params ro; }\n",
        "if [ -f (hd1,1)/x ]; then set a=b; fi\nmenuentry a { linux /v a=$a; }\n",
        "search --set=root -f /v\nmenuentry a { linux ($root)/v ro; }\n",
    ],
)
def test_what_cannot_name_an_init_is_no_doubt(script: str, tmp_path: Path) -> None:
    """Values that only the running machine knows do no harm if they decide nothing."""
    make_tree(tmp_path, {**THREE, "/boot/grub/grub.cfg": script})
    found = vmprovision.inspect(tmp_path).init
    assert (found.system, found.confidence) == ("sysv", "certain")


def test_entries_that_agree_need_no_default(tmp_path: Path) -> None:
    """Where every kernel is started with the same init=, it does not matter which boots."""
    entry = "title {0}\nlinux /v\noptions root=x init=" + RUNIT + "\n"
    files: Tree = {f"/boot/loader/entries/{n}.conf": entry.format(n) for n in "ab"}
    assert vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init.system == "runit"


def test_other_programs_of_the_firmware_are_no_entries(tmp_path: Path) -> None:
    """A memory test beside the kernel's entries has no say in which init starts."""
    files: Tree = {
        "/boot/loader/entries/a.conf": f"title A\nlinux /v\noptions root=x init={RUNIT}\n",
        "/boot/loader/entries/memtest.conf": "title memtest86+\nefi /memtest.efi\n",
    }
    assert vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init.system == "runit"


def test_a_circle_of_links_is_no_menu(tmp_path: Path) -> None:
    """It boots nothing, and the guest is judged by the rest."""
    files: Tree = {"/boot/grub": Link("grub2"), "/boot/grub2": Link("grub")}
    assert vmprovision.inspect(make_tree(tmp_path, {**THREE, **files})).init.system == "sysv"


def test_the_last_option_of_a_command_line_counts() -> None:
    """As in the kernel; rdinit= is another option, and a relative path none."""
    assert init_option("init=/a rdinit=/b init=/c quiet") == PurePosixPath("/c")
    assert init_option("rdinit=/b init=c") is None


def test_a_hostile_menu_ends_soon(tmp_path: Path) -> None:
    """Submenus without an end, and braces without number, are a doubt."""
    text = "submenu 'a' {\n" * 60_000 + "{\n" * 60_000
    make_tree(tmp_path, {**THREE, "/boot/grub/grub.cfg": text})
    (menu,) = read_boot_menus(LocalFilesystem(tmp_path))
    assert menu.doubt
