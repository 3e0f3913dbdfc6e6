"""Process 1 of the saved appliance, in place of libguestfs's own; the bundled runtime runs it.

It starts guestfsd with what every guest needs and nothing else: no udev, no RAID, LVM or
dynamic disks, no network.  Which of these a guest needs is seen later, and started by
/usr/lib/vmprovision/volumes.  No program is started for what a system call can do: without
KVM each takes a tenth of a second.
"""

import os
import posix
import time

import _appliance

OURS = "/usr/lib/vmprovision/"
ROOT = "/root"
DISK = "/dev/vda"
DISK_SECONDS = 280  # the host makes it meanwhile
PAUSE = 0.002
MS_NOSUID, MS_MOVE = 2, 8192
PACKED = 4  # MODULE_INIT_COMPRESSED_FILE of linux/module.h
STICKY = 0o1777
PLACES = ("/sbin", "/usr/sbin", "/bin", "/usr/bin")  # guestfsd looks there, in this order
VARIABLES = {"PATH": ":".join(PLACES), "LC_ALL": "C", "LVM_SYSTEM_DIR": "/tmp/lvm"}  # noqa: S108
FILESYSTEMS = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"))
# What guests often need stands in memory when the machine is saved.
PROGRAMS = ("blkid", "btrfs")


def main():
    for kind, place in FILESYSTEMS:
        make_folder(place)
        _appliance.mount(kind, place, kind, 0, None)
    load_modules("/modules/")
    wait_for(DISK)
    enter_root()
    make_folders()
    hide_udevadm()
    name_ports()
    make_nodes("/lib/modules/%s/modules.devname" % posix.uname()[2])
    configure()
    for program in PROGRAMS:
        read(program)
    attendant = start([OURS + "python", "-X", "heapsize=4m", OURS + "attendant.py"])
    ends = attendant, start(["guestfsd"])
    while posix.waitpid(-1, 0)[0] not in ends:
        pass


def load_modules(folder):
    """Load each, in the order of their names, and leave no copy in memory."""
    for name in sorted(entry[0] for entry in os.ilistdir(folder)):
        file = posix.open(folder + name, 0)
        try:
            _appliance.load_module(file, 0 if name.endswith(".ko") else PACKED)
        except OSError as exc:  # a processor without what it needs, for example
            print("module %s: %s" % (name, exc))  # noqa: T201 -- to the console
        posix.close(file)
        os.remove(folder + name)


def wait_for(path):
    ends = time.time() + DISK_SECONDS
    while not exists(path):
        if time.time() > ends:
            raise OSError("%s does not appear" % path)
        time.sleep(PAUSE)


def enter_root():
    make_folder(ROOT)
    _appliance.mount(DISK, ROOT, "ext4", 0, None)  # which mounts ext2 as well
    for _, place in FILESYSTEMS:
        make_folder(ROOT + place)
        _appliance.mount(place, ROOT + place, "", MS_MOVE, None)
    _appliance.switch_root(ROOT)


def make_folders():
    for path in ("/tmp", "/var/tmp"):  # noqa: S108 -- this machine has one user
        if is_link(path):
            os.remove(path)
        make_folder(path)
        posix.chmod(path, STICKY)
    for path in ("/run", "/sysroot", "/dev/pts", "/dev/shm", "/dev/virtio-ports", "/dev/disk"):  # noqa: S108
        make_folder(path)
    make_folder("/dev/disk/by-path")
    _appliance.mount("devpts", "/dev/pts", "devpts", 0, None)
    _appliance.mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777")  # noqa: S108
    _appliance.mount("tmpfs", "/run", "tmpfs", MS_NOSUID, "mode=0755")
    make_folder("/run/lock")
    make_folder("/run/vmprovision")
    for target, path in (
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/mounts", "/etc/mtab"),
        ("../run/lock", "/var/lock"),
    ):
        if not exists(path):
            posix.symlink(target, path)


def hide_udevadm():
    """Let guestfsd find no udevadm.

    It waits for udev before and after much that it does, and goes on where it cannot.  As
    long as no udevd runs, there is nothing to wait for.
    """
    make_folder(OURS + "real")
    for folder in PLACES:
        place = folder + "/udevadm"
        if is_link(place):
            os.remove(place)
        elif exists(place):
            os.rename(place, OURS + "real/udevadm")
            put(OURS + "real/udevadm.place", place + "\n")


def name_ports():
    ports = "/sys/class/virtio-ports/"
    for entry in os.ilistdir(ports):
        name = get(ports + entry[0] + "/name").strip()
        posix.symlink("../" + entry[0], "/dev/virtio-ports/" + name)


def make_nodes(table):
    """Make the device nodes for which the kernel loads a module as soon as they are opened."""
    for line in get(table).split("\n"):
        words = line.split("#")[0].split()
        if words and words[2][0] == "c" and not exists("/dev/" + words[1]):
            parts = words[1].split("/")
            for count in range(1, len(parts)):
                make_folder("/dev/" + "/".join(parts[:count]))
            major, minor = words[2][1:].split(":")
            _appliance.mknod("/dev/" + words[1], int(major), int(minor))


def configure():
    make_folder("/tmp/lvm")  # noqa: S108
    has_list = any(exists(folder + "/lvmdevices") for folder in PLACES)
    put("/tmp/lvm/lvm.conf", "devices {\n\tuse_devicesfile = 0\n}\n" if has_list else "")  # noqa: S108
    put("/etc/machine-id", "%032d\n" % 0)  # the attendant writes a new one over it


def read(program):
    for folder in PLACES:
        if exists(folder + "/" + program):
            file = posix.open(folder + "/" + program, 0)
            while posix.read(file, 1 << 16):
                pass
            posix.close(file)
            return


def start(words):
    child = posix.fork()
    if child == 0:
        try:
            variables = os.environ
            variables.update(VARIABLES)
            posix.execvpe(words[0], words, variables)
        finally:
            posix._exit(127)
    return child


def make_folder(path):
    if not exists(path):
        os.mkdir(path)


def exists(path):
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def is_link(path):
    try:
        posix.readlink(path)
    except OSError:
        return False
    return True


def get(path):
    with open(path) as file:
        return file.read()


def put(path, content):
    with open(path, "w") as file:
        file.write(content)


try:
    main()
except Exception as exc:
    print("process 1: %r" % exc)  # noqa: T201 -- to the console, which the host shows
_appliance.reboot()
