"""What the host asks of a saved appliance besides guestfsd; the bundled runtime runs it.

The host and the attendant talk over a virtio port of their own, a line each:

``parked``            (attendant, once) guestfsd waits for its host: the appliance can be saved
``resume TIME HEX``   set the clock (seconds) and the random generator; ``resumed``
``attach ID``         wait for the disk with this SCSI id and its partitions;
                      ``disk ID NAME BYTES SERIAL``
``empty ID``          wait until the drive with this SCSI id has no disk; ``empty ID``
``detach ID``         wait until it is gone; ``gone ID``
``mount DEVICE DRIVER ro|rw PLACE [OPTIONS]``
                      mount at a place of the guest, with options of the filesystem's own;
                      place and options are in hexadecimal; ``mounted``
``make KIND PLACE MODE UID GID LABEL COUNT``
                      make a file (``f``), directory (``d``) or link (``l``) at a path of the
                      guest whose parents are no links; mode and label (``-`` for none) are as
                      for ``fchmod`` and ``setxattr``; after this line come so many bytes: the
                      content, or where the link leads; ``make COUNT`` and its status
``remove KIND PLACE`` remove a file, link or empty directory; ``removed``
``unmount [PLACE]``   what is mounted at a place of the guest, or all; ``unmounted``
``look DEVICE DRIVER OPTIONS NAME...``
                      mount it read-only in a place of its own, and unmount it; ``seen`` and
                      which of these names are in its root directory
``read DEVICE PLACE SIZE``
                      ``read COUNT``, and after this line so many bytes of a device
``content PATH PLACE SIZE``
                      ``content COUNT``, and after this line so many bytes of a regular file
                      of the guest
``entries KNOWN NAMES LIMIT PLACE...``
                      ``entries COUNT``, and after this line so many bytes with what these
                      directories of the guest hold, or these files of at most LIMIT bytes; in
                      a directory with more entries than KNOWN only those that NAMES (separated
                      by commas) name are described; see ``parse_parts`` on the host
``statuses PLACE...`` ``statuses COUNT``, and after this line so many bytes with the statuses of
                      these paths of the guest
``sealed PLACE``      ``sealed yes`` if a directory of the guest is a read-only subvolume of btrfs,
                      else ``sealed no``
``map TABLE LINK...`` make devices of device-mapper by a concise table of dmsetup(8), in
                      hexadecimal, and the link /dev/LINK to each, in its order; ``mapped``
``unmap``             remove these links and devices; ``unmapped``
``volumes``           what a stock appliance does as it starts; ``volumes STATUS``

What fails is answered with ``failed``, the number of the error (errno(3)) or 0, and the reason.
"""

import os
import posix
import time

import _appliance

PORT = "/dev/virtio-ports/org.vmprovision.attendant"
FOLDER = "/run/vmprovision/"
DEVICES = "/sys/class/scsi_device/"
VOLUMES = "/usr/lib/vmprovision/volumes"
SYSROOT = "/sysroot"  # where guestfsd has the guest
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 1, 2, 4, 8, 1024
FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME
MAPPER = "/dev/mapper/"
LOOK = FOLDER + "look"
UDEV = "/run/udev/control"
BY_PATH = "/dev/disk/by-path/appliance-scsi-"
O_RDWR = 2
PAUSE = 0.001
PARKING_PAUSE = 0.05  # guestfsd starts meanwhile, on the same processor
PARKING_POLLS = 4  # it sleeps as well while a program that it has started runs
DAEMON = b"guestfsd\n"
CHANNEL = "/dev/vport"  # the beginning of the kernel's names
DISK_SECONDS = 30
SECTOR = 512
ROOM = 256 << 10  # bytes of an answer
VPD_HEAD = 4  # bytes before the serial number in SCSI page 0x80
DISK_TIMEOUT = b"300"  # seconds; the host's storage may be far away


def main():
    port = posix.open(PORT, O_RDWR)
    wait_for_daemon()
    posix.write(port, b"parked\n")
    rest = b""
    while True:
        read = posix.read(port, 4096)
        if not read:  # the host's process is gone
            _appliance.reboot()
        rest += read
        while b"\n" in rest:
            line, rest = rest.split(b"\n", 1)
            words = line.decode().split()
            if words[0] == "make":
                count = int(words[-1])
                answered = answer(make, port, rest[:count], count, *words[1:-1])
                rest = rest[count:]
            else:
                answered = answer(COMMANDS.get(words[0]), *words[1:])
            send(port, answered)


def wait_for_daemon():
    """Wait until guestfsd has opened its channel and sleeps, with all of its start done.

    It sleeps in its first write to the channel, because no host has connected.
    """
    polls, used = 0, None
    while polls < PARKING_POLLS:
        time.sleep(PARKING_PAUSE)
        now = time_of_daemon()
        polls = polls + 1 if now and now == used else 0
        used = now


def time_of_daemon():
    """Return the processor time of a guestfsd that sleeps with its channel open, or None."""
    for process in names("/proc"):
        if process.isdigit():
            try:
                return time_asleep("/proc/" + process)
            except OSError:  # another program, or busy, or it has ended meanwhile
                pass
    return None


def time_asleep(folder):
    if get(folder + "/comm") != DAEMON:
        raise OSError
    state, *fields = get(folder + "/stat").split(b") ")[-1].split()
    files = [posix.readlink(folder + "/fd/" + name) for name in names(folder + "/fd")]
    if state != b"S" or not any(file.startswith(CHANNEL) for file in files):
        raise OSError
    return fields[10:12]


def send(port, answered):
    if isinstance(answered, str):
        answered = answered.encode() + b"\n"
    while answered:  # the port takes so much at a time
        answered = answered[posix.write(port, answered) :]


def answer(command, *arguments):
    try:
        return command(*arguments)
    except Exception as exc:
        number = exc.errno if isinstance(exc, OSError) else None
        return "failed %d %r" % (number or 0, exc)


def resume(now, entropy):
    _appliance.set_time(int(now))
    content = bytes.fromhex(entropy)
    _appliance.reseed(content[16:])
    put("/etc/machine-id", entropy[:32].encode() + b"\n")
    return "resumed"


def attach(number):
    name = wait_for(lambda: disk_at(number))
    # wait for its name, then for the reading of its partition table
    wait_for(lambda: opened("/dev/" + name))
    put("/sys/block/%s/device/timeout" % name, DISK_TIMEOUT)
    # guestfsd looks for disks here; udev, if it runs, makes the same link
    if not exists(UDEV):
        posix.symlink("../../" + name, BY_PATH + number)
        linked.append(number)
    serial = get("/sys/block/%s/device/vpd_pg80" % name)[VPD_HEAD:]
    return "disk %s %s %d %s" % (number, name, size_of(name), serial.decode().strip())


def empty(number):
    name = disk_at(number)
    # opened, the drive is asked for its disk; the kernel then drops the old disk's partitions
    wait_for(lambda: not opened("/dev/" + name) and size_of(name) == 0)
    if any(entry.startswith(name) for entry in names("/sys/block/" + name)):
        raise OSError("the partitions of %s are still there" % name)
    forget(number)
    return "empty " + number


def detach(number):
    wait_for(lambda: disk_at(number) is None)
    forget(number)
    return "gone " + number


def forget(number):
    if not exists(UDEV) and number in linked:
        linked.remove(number)
        os.remove(BY_PATH + number)


def size_of(name):
    return int(get("/sys/block/%s/size" % name)) * SECTOR


def mount(device, driver, access, place, options=""):
    flags = FLAGS | (MS_RDONLY if access == "ro" else 0)
    data = bytes.fromhex(options).decode() if options else None
    _appliance.mount(device, in_guest(place), driver, flags, data)
    return "mounted"


def in_guest(place):
    return SYSROOT + bytes.fromhex(place).decode().rstrip("/")


def make(port, already, count, kind, place, *attributes):
    mode, uid, gid = [int(number) for number in attributes[:3]]
    label = b"" if attributes[3] == "-" else bytes.fromhex(attributes[3])
    path = in_guest(place)
    made = _appliance.make(port, already, count, path, kind, mode, uid, gid, label)
    return counted("make", made)


def remove(kind, place):
    _appliance.remove(in_guest(place), kind == "d")
    return "removed"


def look(device, driver, options, *wanted):
    if not exists(LOOK):
        os.mkdir(LOOK)
    data = None if options == "-" else bytes.fromhex(options).decode()
    _appliance.mount(device, LOOK, driver, FLAGS | MS_RDONLY, data)
    names = {name.encode(): name for name in wanted}
    try:
        seen = [names[entry[0]] for entry in os.ilistdir(LOOK.encode()) if entry[0] in names]
    finally:
        _appliance.umount(LOOK)
    return " ".join(["seen"] + seen)  # noqa: RUF005 -- MicroPython has no other way


def read(device, place, size):
    with open(device, "rb") as file:
        file.seek(int(place))
        return counted("read", file.read(int(size)))


def content(path, place, size):
    return counted("content", _appliance.content(in_guest(path), int(place), int(size)))


def entries(known, wanted, limit, *places):
    paths = [in_guest(place) for place in places]
    return counted(
        "entries", _appliance.entries(paths, int(known), wanted.split(","), int(limit), ROOM)
    )


def statuses(*places):
    return counted("statuses", _appliance.statuses([in_guest(place) for place in places], ROOM))


def sealed(place):
    return "sealed " + ("yes" if _appliance.is_sealed(in_guest(place)) else "no")


def counted(word, found):
    return ("%s %d\n" % (word, len(found))).encode() + found


def map_devices(table, *links):
    text = bytes.fromhex(table).decode()
    for link in links:
        if exists(folder_of(link)) and folder_of(link) not in made:
            raise OSError("/dev/%s is there already" % link)
    try:
        for device, link in zip(text.split(";"), links):  # noqa: B905 -- MicroPython has no strict
            make_device(link, *device.split(","))
    except OSError:
        unmap()
        raise
    return "mapped"


def make_device(link, name, uuid, _number, _access, *lines):
    node = "../dm-%d" % _appliance.map(name, uuid, lines)
    mapped.append(name)
    posix.symlink(node, MAPPER + name)
    made.append(MAPPER + name)
    if folder_of(link) not in made:
        os.mkdir(folder_of(link))
        made.append(folder_of(link))
    posix.symlink(MAPPER + name, "/dev/" + link)
    made.append("/dev/" + link)


def folder_of(link):
    return "/dev/" + link.split("/")[0]


def unmap():
    while made:
        path = made.pop()
        if path == folder_of(path[len("/dev/") :]):
            os.rmdir(path)
        else:
            os.remove(path)
    while mapped:
        _appliance.unmap(mapped[-1])
        mapped.pop()
    return "unmapped"


def unmount(place=None):
    if place:
        _appliance.umount(in_guest(place))
        return "unmounted"
    places = [line.split(b" ")[1] for line in get("/proc/mounts").split(b"\n") if line]
    for mounted in reversed(places):
        if mounted == SYSROOT.encode() or mounted.startswith(SYSROOT.encode() + b"/"):
            _appliance.umount(unescaped(mounted))
    return "unmounted"


def unescaped(place):
    """As getmntent(3) has it: space, tab, newline and backslash are octal numbers."""
    first, *parts = place.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts)


def volumes():
    unmap()
    child = posix.fork()
    if child == 0:
        try:
            posix.execvpe(VOLUMES, [VOLUMES], os.environ)
        finally:
            posix._exit(127)
    return "volumes %d" % posix.waitpid(child, 0)[1]


linked = []  # numbers of disks with a link by their path
mapped = []  # names of device-mapper's devices
made = []  # links to them, and the links' folders

COMMANDS = {
    "resume": resume,
    "attach": attach,
    "empty": empty,
    "detach": detach,
    "mount": mount,
    "unmount": unmount,
    "look": look,
    "remove": remove,
    "read": read,
    "content": content,
    "entries": entries,
    "statuses": statuses,
    "sealed": sealed,
    "map": map_devices,
    "unmap": unmap,
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
    raise OSError("timed out waiting for the device")


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
