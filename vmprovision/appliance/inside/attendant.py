"""What the host asks of a saved appliance besides guestfsd; the bundled runtime runs it.

The host and the attendant talk over a virtio port of their own, a line each:

``parked``            (attendant, once) the appliance can be saved now
``resume TIME HEX``   set the clock (seconds) and the random generator; ``resumed``
``attach ID``         wait for the disk with this SCSI id and its partitions;
                      ``disk ID NAME BYTES SERIAL``
``detach ID``         wait until it is gone; ``gone ID``
``mount DEVICE DRIVER ro|rw PLACE``
                      mount at a place of the guest, which is in hexadecimal; ``mounted``
``unmount``           all that is mounted of the guest; ``unmounted``
``volumes``           what a stock appliance does as it starts; ``volumes STATUS``

What fails is answered with ``failed`` and the reason.
"""

import os
import posix
import time

import _guest

PORT = "/dev/virtio-ports/org.vmprovision.attendant"
FOLDER = "/run/vmprovision/"
DEVICES = "/sys/class/scsi_device/"
VOLUMES = "/usr/lib/vmprovision/volumes"
SYSROOT = "/sysroot"  # where guestfsd has the guest
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 1, 2, 4, 8, 1024
UDEV = "/run/udev/control"
BY_PATH = "/dev/disk/by-path/appliance-scsi-"
O_RDWR = 2
PAUSE = 0.001
DISK_SECONDS = 30
SECTOR = 512
VPD_HEAD = 4  # bytes before the serial number in SCSI's page 0x80
DISK_TIMEOUT = b"300"  # seconds; the host's storage may be far away


def main():
    port = posix.open(PORT, O_RDWR)
    while not exists(FOLDER + "parked"):
        time.sleep(PAUSE)
    posix.write(port, b"parked\n")
    rest = b""
    while True:
        read = posix.read(port, 4096)
        if not read:  # whoever restored this is gone
            run("reboot", "-f")
        lines = (rest + read).split(b"\n")
        rest = lines.pop()
        for line in lines:
            posix.write(port, answer(line.decode().split()).encode() + b"\n")


def answer(words):
    try:
        return COMMANDS[words[0]](*words[1:])
    except Exception as exc:
        return "failed %r" % (exc,)


def resume(now, entropy):
    _guest.set_time(int(now))
    content = bytes.fromhex(entropy)
    _guest.reseed(content[16:])
    put("/etc/machine-id", entropy[:32].encode() + b"\n")
    put(FOLDER + "go", b"\n")
    return "resumed"


def attach(number):
    name = wait_for(lambda: disk_at(number))
    # it is opened as soon as it is known by name, and after its partition table was read
    wait_for(lambda: opened("/dev/" + name))
    put("/sys/block/%s/device/timeout" % name, DISK_TIMEOUT)
    # where guestfsd looks for disks; udev makes the same, where it runs
    if not exists(UDEV):
        posix.symlink("../../" + name, BY_PATH + number)
    size = int(get("/sys/block/%s/size" % name)) * SECTOR
    serial = get("/sys/block/%s/device/vpd_pg80" % name)[VPD_HEAD:]
    return "disk %s %s %d %s" % (number, name, size, serial.decode().strip())


def detach(number):
    wait_for(lambda: disk_at(number) is None)
    if not exists(UDEV):
        os.remove(BY_PATH + number)
    return "gone " + number


def mount(device, driver, access, place):
    target = SYSROOT + bytes.fromhex(place).decode().rstrip("/")
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME
    _guest.mount(device, target, driver, flags | (MS_RDONLY if access == "ro" else 0), None)
    return "mounted"


def unmount():
    places = [line.split(b" ")[1] for line in get("/proc/mounts").split(b"\n") if line]
    for place in reversed(places):
        if place == SYSROOT.encode() or place.startswith(SYSROOT.encode() + b"/"):
            _guest.umount(unescaped(place))
    return "unmounted"


def unescaped(place):
    """As getmntent(3) has it: space, tab, newline and backslash are octal numbers."""
    first, *parts = place.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts)


def volumes():
    return "volumes %d" % run(VOLUMES)


def run(*words):
    child = posix.fork()
    if child == 0:
        try:
            posix.execvpe(words[0], list(words), os.environ)
        finally:
            posix._exit(127)
    return posix.waitpid(child, 0)[1]


COMMANDS = {
    "resume": resume,
    "attach": attach,
    "detach": detach,
    "mount": mount,
    "unmount": unmount,
    "volumes": volumes,
}


def disk_at(number):
    for device in names(DEVICES):
        if device.split(":")[1:] == ["0", number, "0"]:
            for name in names(DEVICES + device + "/device/block"):
                return name
    return None


def opened(path):
    try:
        posix.close(posix.open(path, 0))
    except OSError:
        return False
    return True


def wait_for(condition):
    ends = time.time() + DISK_SECONDS
    while time.time() < ends:
        found = condition()
        if found:
            return found
        time.sleep(PAUSE)
    raise OSError("it was waited for in vain")


def names(folder):
    try:
        return [entry[0] for entry in os.ilistdir(folder)]
    except OSError:
        return []


def exists(path):
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def get(path):
    file = posix.open(path, 0)
    try:
        return posix.read(file, 1 << 16)
    finally:
        posix.close(file)


def put(path, content):
    file = posix.open(path, posix.O_WRONLY)
    try:
        posix.write(file, content)
    finally:
        posix.close(file)


main()
