// _appliance: what process 1 and the attendant of a saved appliance ask of its kernel, and
// do to the guest that is mounted there.  The guest is hostile: no link of it is followed,
// nothing that is not a regular file or a directory is read, and no answer is larger than
// was asked for.

#define _GNU_SOURCE  // O_PATH, syscall
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "bindings.h"
#include "py/mphal.h"

#define LABEL "security.selinux"

// Close a file of which nothing is expected any more; errno stays.
static void drop(int file) {
    int kept = errno;
    close(file);
    errno = kept;
}

// --- the appliance's kernel ---------------------------------------------------

static mp_obj_t appliance_mount(size_t count, const mp_obj_t *args) {
    (void)count;
    const char *options = mp_obj_is_true(args[4]) ? STR(args[4]) : NULL;
    return done(mount(STR(args[0]), STR(args[1]), STR(args[2]), WORD(args[3]), options));
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(appliance_mount_obj, 5, 5, appliance_mount);

FUNCTION_1(appliance_umount, done(umount(STR(a))));
FUNCTION_3(appliance_mknod, done(mknod(STR(a), S_IFCHR | 0600, makedev(INT(b), INT(c)))));
FUNCTION_0(appliance_reboot, (sync(), done(reboot(RB_AUTOBOOT))));

// Make a mounted filesystem the root: its own mount goes over the former root.
static mp_obj_t appliance_switch_root(mp_obj_t place) {
    return done(chdir(STR(place)) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".")
        || chdir("/") ? -1 : 0);
}
static MP_DEFINE_CONST_FUN_OBJ_1(appliance_switch_root_obj, appliance_switch_root);

// An open file with a module of the kernel, and the flags of finit_module(2).
FUNCTION_2(appliance_load_module, done(syscall(SYS_finit_module, INT(a), "", INT(b))));

static mp_obj_t appliance_set_time(mp_obj_t seconds) {
    struct timeval now = {.tv_sec = mp_obj_get_int(seconds)};
    return done(settimeofday(&now, NULL));
}
static MP_DEFINE_CONST_FUN_OBJ_1(appliance_set_time_obj, appliance_set_time);

// As linux/random.h has them, which musl's compiler does not find.
#define RNDADDENTROPY _IOW('R', 0x03, int[2])
#define RNDRESEEDCRNG _IO('R', 0x07)

// New random bytes for the kernel's generator (random(4)), in use from the next read on.
static mp_obj_t appliance_reseed(mp_obj_t entropy) {
    struct { int entropy_count, buf_size; char content[256]; } pool;
    mp_buffer_info_t buffer;
    mp_get_buffer_raise(entropy, &buffer, MP_BUFFER_READ);
    size_t size = buffer.len < sizeof(pool.content) ? buffer.len : sizeof(pool.content);
    pool.entropy_count = size * 8;
    pool.buf_size = size;
    memcpy(pool.content, buffer.buf, size);
    int device = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    checked(device);
    int failed = ioctl(device, RNDADDENTROPY, &pool) || ioctl(device, RNDRESEEDCRNG);
    drop(device);
    return done(failed ? -1 : 0);
}
static MP_DEFINE_CONST_FUN_OBJ_1(appliance_reseed_obj, appliance_reseed);

// --- device-mapper ------------------------------------------------------------

// As linux/dm-ioctl.h has them.
struct dm_ioctl {
    uint32_t version[3], data_size, data_start, target_count;
    int32_t open_count;
    uint32_t flags, event, padding;
    uint64_t device;
    char name[128], uuid[129], data[7];
};
struct dm_target { uint64_t start, length; int32_t status; uint32_t next; char type[16]; };
enum { DM_CREATE = 3, DM_REMOVE = 4, DM_SUSPEND = 6, DM_LOAD = 9 };  // to "suspend" resumes, too

// Send a command with the targets that stand behind it.  Return 0, or -1 with errno.
static int tell_mapper(int command, struct dm_ioctl *sent, const char *name, size_t targets) {
    if (strlen(name) >= sizeof(sent->name)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
    if (control < 0) {
        return -1;
    }
    sent->version[0] = 4;
    sent->data_size = sizeof(*sent) + targets;
    sent->data_start = sizeof(*sent);
    strcpy(sent->name, name);
    int result = ioctl(control, _IOWR(0xfd, command, struct dm_ioctl), sent);
    drop(control);
    return result < 0 ? -1 : 0;
}

static int remove_mapped(const char *name) {
    struct dm_ioctl sent = {0};
    return tell_mapper(DM_REMOVE, &sent, name, 0);
}

// Add a line of a table, "START LENGTH TYPE PARAMETERS".
static void add_target(vstr_t *sent, const char *line) {
    struct dm_target target = {0};
    char *rest;
    target.start = strtoull(line, &rest, 10);
    target.length = strtoull(rest, &rest, 10);
    rest += strspn(rest, " ");
    size_t length = strcspn(rest, " ");
    memcpy(target.type, rest, length < sizeof(target.type) ? length : sizeof(target.type) - 1);
    const char *parameters = rest + length + strspn(rest + length, " ");
    size_t size = sizeof(target) + strlen(parameters) + 1;
    target.next = (size + 7) & ~(size_t)7;
    char *place = vstr_add_len(sent, target.next);
    memset(place, 0, target.next);
    memcpy(place, &target, sizeof(target));
    strcpy(place + sizeof(target), parameters);
}

// Make a device with this name, UUID and table, a list of lines; return its minor number.
static mp_obj_t appliance_map(mp_obj_t name, mp_obj_t uuid, mp_obj_t lines) {
    size_t count;
    mp_obj_t *items;
    mp_obj_get_array(lines, &count, &items);
    struct dm_ioctl sent = {0};
    if (strlen(STR(uuid)) >= sizeof(sent.uuid)) {
        mp_raise_OSError(ENAMETOOLONG);
    }
    strcpy(sent.uuid, STR(uuid));
    done(tell_mapper(DM_CREATE, &sent, STR(name), 0));
    uint64_t device = sent.device;
    vstr_t table;
    vstr_init(&table, 4096);
    memset(vstr_add_len(&table, sizeof(sent)), 0, sizeof(sent));
    for (size_t i = 0; i < count; i++) {
        add_target(&table, STR(items[i]));
    }
    struct dm_ioctl *load = (struct dm_ioctl *)table.buf;
    load->target_count = count;
    struct dm_ioctl resume = {0};
    if (tell_mapper(DM_LOAD, load, STR(name), table.len - sizeof(sent)) != 0
        || tell_mapper(DM_SUSPEND, &resume, STR(name), 0) != 0) {
        int failure = errno;
        remove_mapped(STR(name));
        mp_raise_OSError(failure);
    }
    return mp_obj_new_int((device & 0xff) | (device >> 12 & ~0xffull));
}
static MP_DEFINE_CONST_FUN_OBJ_3(appliance_map_obj, appliance_map);

FUNCTION_1(appliance_unmap, done(remove_mapped(STR(a))));

// --- paths --------------------------------------------------------------------

// Open the directory of a path of which no component is a link.  `last` gets the last
// component, "." for the root.
static int open_folder(const char *path, char last[NAME_MAX + 1]) {
    int at = open("/", O_PATH | O_CLOEXEC);
    strcpy(last, ".");
    while (at >= 0) {
        path += strspn(path, "/");
        size_t length = strcspn(path, "/");
        if (length == 0) {
            return at;
        }
        if (length > NAME_MAX) {
            errno = ENAMETOOLONG;
            drop(at);
            return -1;
        }
        memcpy(last, path, length);
        last[length] = 0;
        path += length;
        if (path[strspn(path, "/")] != 0) {
            int next = openat(at, last, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            drop(at);
            at = next;
        }
    }
    return at;
}

static int open_without_links(const char *path) {
    char name[NAME_MAX + 1];
    int folder = open_folder(path, name);
    if (folder < 0) {
        return -1;
    }
    // NONBLOCK and NOCTTY: it may be anything
    int file = openat(folder, name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC);
    drop(folder);
    return file;
}

// --- answers ------------------------------------------------------------------

// Before each part of an answer: an errno or 0, what kind of part it is, and its bytes.
struct head { uint32_t failure, kind, size; };
enum { LISTING, CONTENT, STATUS };

// One file: which of the listed names it has, its status, and how many bytes follow with
// the target of a link and with the SELinux label.
struct __attribute__((packed)) described {
    uint32_t which, mode, links, uid, gid, target, label;
    uint64_t size;
};
#define OWN UINT32_MAX      // in `which`: the directory itself
#define UNKNOWN UINT32_MAX  // in `label`: it was not asked for, or cannot be read
#define DESCRIPTION_LIMIT (sizeof(struct described) + 2 * PATH_MAX)

struct answer { vstr_t bytes; size_t begun, end; };

static void begin_answer(struct answer *answer, size_t room) {
    vstr_init(&answer->bytes, room + sizeof(struct head));  // so it never moves
    answer->end = room;
}

static void begin_part(struct answer *answer) {
    answer->begun = answer->bytes.len;
    vstr_add_len(&answer->bytes, sizeof(struct head));
}

static void end_part(struct answer *answer, int kind, int failure) {
    size_t body = answer->begun + sizeof(struct head);
    if (failure != 0) {
        answer->bytes.len = body;
    }
    struct head head = {failure, kind, answer->bytes.len - body};
    memcpy(answer->bytes.buf + answer->begun, &head, sizeof(head));
}

static bool has_room(const struct answer *answer, size_t size) {
    return answer->bytes.len + size <= answer->end;
}

// Add the description of a name in a directory, or of an open file.
static void describe(struct answer *answer, const struct stat *status, int folder,
    const char *name, uint32_t which, ssize_t labelled, const char *label) {
    char target[PATH_MAX];
    ssize_t length = S_ISLNK(status->st_mode) ? readlinkat(folder, name, target, PATH_MAX) : 0;
    struct described entry = {
        .which = which, .mode = status->st_mode, .links = status->st_nlink,
        .uid = status->st_uid, .gid = status->st_gid, .target = length > 0 ? length : 0,
        .label = labelled, .size = status->st_size,
    };
    vstr_add_strn(&answer->bytes, (const char *)&entry, sizeof(entry));
    vstr_add_strn(&answer->bytes, target, entry.target);
    if (entry.label != UNKNOWN) {
        vstr_add_strn(&answer->bytes, label, entry.label);
    }
}

// Return the size of a label, 0 if there is none.
static ssize_t label_size(ssize_t found) {
    return found >= 0 ? found : errno == ENODATA || errno == EOPNOTSUPP ? 0 : -1;
}

static void describe_open(struct answer *answer, const struct stat *status, int file) {
    char label[PATH_MAX];
    ssize_t size = label_size(fgetxattr(file, LABEL, label, sizeof(label)));
    describe(answer, status, file, ".", OWN, size, label);
}

// Add the description of one name in a directory, with its label.  Return an errno.
static int describe_name(struct answer *answer, int folder, const char *name) {
    char label[PATH_MAX];
    struct stat status;
    if (!has_room(answer, DESCRIPTION_LIMIT)) {
        return E2BIG;
    }
    if (fstatat(folder, name, &status, AT_SYMLINK_NOFOLLOW) != 0 || fchdir(folder) != 0) {
        return errno;
    }
    ssize_t size = label_size(lgetxattr(name, LABEL, label, sizeof(label)));
    chdir("/");  // a working directory keeps its filesystem from being unmounted
    describe(answer, &status, folder, name, OWN, size, label);
    return 0;
}

// --- what the guest holds -----------------------------------------------------

// At most `size` bytes of a regular file, from `place` on.
static mp_obj_t appliance_content(mp_obj_t path, mp_obj_t place, mp_obj_t size) {
    vstr_t buffer;
    vstr_init_len(&buffer, INT(size));
    int file = open_without_links(STR(path));
    checked(file);
    struct stat status;
    ssize_t found = fstat(file, &status);
    if (found == 0 && !S_ISREG(status.st_mode)) {
        errno = EINVAL;
        found = -1;
    }
    if (found == 0) {
        MP_HAL_RETRY_SYSCALL(found, pread(file, buffer.buf, buffer.len, INT(place)), );
    }
    drop(file);
    return bytes_of(&buffer, found);
}
static MP_DEFINE_CONST_FUN_OBJ_3(appliance_content_obj, appliance_content);

// Whose statuses are wanted in directories that have more than `known` entries: names, or
// their beginnings with an asterisk.
struct wanted { size_t known, count; mp_obj_t *names; };

static bool is_wanted(const struct wanted *wanted, const char *name) {
    for (size_t i = 0; i < wanted->count; i++) {
        const char *pattern = STR(wanted->names[i]);
        size_t length = strcspn(pattern, "*");
        if (strncmp(name, pattern, length) == 0 && (pattern[length] || !name[length])) {
            return true;
        }
    }
    return false;
}

// Add the names in a directory, each with a NUL behind it and one more behind all, then
// descriptions.  Return an errno.
static int add_listing(struct answer *answer, int folder, const struct wanted *wanted) {
    DIR *stream = fdopendir(folder);
    if (stream == NULL) {
        drop(folder);
        return errno;
    }
    vstr_t *found = &answer->bytes;
    size_t place = found->len, count = 0;
    struct dirent *entry;
    while (errno = 0, (entry = readdir(stream)) != NULL && has_room(answer, NAME_MAX + 2)) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            vstr_add_strn(found, entry->d_name, strlen(entry->d_name) + 1);
            count++;
        }
    }
    int failure = entry == NULL ? errno : E2BIG;
    vstr_add_byte(found, 0);
    for (size_t which = 0; which < count && failure == 0; which++) {
        const char *name = found->buf + place;
        struct stat status;
        place += strlen(name) + 1;
        if (count > wanted->known && !is_wanted(wanted, name)) {
            continue;
        }
        if (!has_room(answer, DESCRIPTION_LIMIT)) {
            failure = E2BIG;
        } else if (fstatat(folder, name, &status, AT_SYMLINK_NOFOLLOW) == 0) {
            describe(answer, &status, folder, name, which, -1, NULL);
        }
    }
    struct stat own;
    if (failure == 0 && has_room(answer, DESCRIPTION_LIMIT) && fstat(folder, &own) == 0) {
        describe_open(answer, &own, folder);
    }
    closedir(stream);
    return failure;
}

// Add the description of an open file and all its bytes.  Return an errno.
static int add_content(struct answer *answer, int file, const struct stat *status, off_t limit) {
    if (status->st_size > limit || !has_room(answer, DESCRIPTION_LIMIT + limit)) {
        drop(file);
        return E2BIG;
    }
    describe_open(answer, status, file);
    ssize_t size;
    vstr_t *found = &answer->bytes;
    MP_HAL_RETRY_SYSCALL(size, pread(file, found->buf + found->len, limit, 0), );
    found->len += size > 0 ? size : 0;
    drop(file);
    return size < 0 ? errno : 0;
}

// What these paths hold, in at most `room` bytes: the entries of a directory, the content
// of a regular file of at most `limit` bytes.
static mp_obj_t appliance_entries(size_t args_count, const mp_obj_t *args) {
    (void)args_count;
    size_t count;
    mp_obj_t *paths;
    struct answer answer;
    struct wanted wanted = {.known = INT(args[1])};
    mp_obj_get_array(args[0], &count, &paths);
    mp_obj_get_array(args[2], &wanted.count, &wanted.names);
    size_t heads = count * sizeof(struct head);
    begin_answer(&answer, INT(args[4]) + heads);
    for (size_t i = 0; i < count; i++) {
        begin_part(&answer);
        struct stat status;
        int file = open_without_links(STR(paths[i]));
        int failure = file < 0 || fstat(file, &status) != 0 ? errno : 0;
        bool is_folder = failure == 0 && S_ISDIR(status.st_mode);
        if (is_folder) {
            failure = add_listing(&answer, file, &wanted);
        } else if (failure == 0 && S_ISREG(status.st_mode)) {
            failure = add_content(&answer, file, &status, INT(args[3]));
        } else if (file >= 0) {
            close(file);
            failure = failure ? failure : EINVAL;
        }
        end_part(&answer, is_folder ? LISTING : CONTENT, failure);
    }
    return mp_obj_new_bytes_from_vstr(&answer.bytes);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(appliance_entries_obj, 5, 5, appliance_entries);

// The statuses of these paths, in at most `room` bytes.
static mp_obj_t appliance_statuses(mp_obj_t paths, mp_obj_t room) {
    size_t count;
    mp_obj_t *items;
    struct answer answer;
    mp_obj_get_array(paths, &count, &items);
    begin_answer(&answer, INT(room) + count * sizeof(struct head));
    for (size_t i = 0; i < count; i++) {
        begin_part(&answer);
        char name[NAME_MAX + 1];
        int folder = open_folder(STR(items[i]), name);
        int failure = folder < 0 ? errno : describe_name(&answer, folder, name);
        if (folder >= 0) {
            close(folder);
        }
        end_part(&answer, STATUS, failure);
    }
    return mp_obj_new_bytes_from_vstr(&answer.bytes);
}
static MP_DEFINE_CONST_FUN_OBJ_2(appliance_statuses_obj, appliance_statuses);

// As linux/btrfs.h has them.
#define BTRFS_IOC_SUBVOL_GETFLAGS _IOR(0x94, 25, uint64_t)
#define BTRFS_SUBVOL_RDONLY 2

// Whether a directory is a subvolume of btrfs that cannot be written to.
static mp_obj_t appliance_is_sealed(mp_obj_t path) {
    uint64_t flags = 0;
    int folder = open_without_links(STR(path));
    checked(folder);
    int result = ioctl(folder, BTRFS_IOC_SUBVOL_GETFLAGS, &flags);
    drop(folder);
    checked(result);
    return mp_obj_new_bool(flags & BTRFS_SUBVOL_RDONLY);
}
static MP_DEFINE_CONST_FUN_OBJ_1(appliance_is_sealed_obj, appliance_is_sealed);

// --- changes of the guest -----------------------------------------------------

// Bytes from the host: those that were read already, then those that the port still gives.
struct stream { int port; const char *read; size_t already, left; char piece[4096]; };

// Return how many bytes `found` has, 0 at the end.
static size_t next_piece(struct stream *stream, const char **found) {
    size_t size = stream->already;
    *found = stream->read;
    if (stream->left == 0) {
        return 0;
    }
    if (size == 0) {
        size_t most = stream->left < sizeof(stream->piece) ? stream->left : sizeof(stream->piece);
        ssize_t got;
        MP_HAL_RETRY_SYSCALL(got, read(stream->port, stream->piece, most), );
        if (got <= 0) {
            mp_raise_OSError(EPIPE);  // the host is gone
        }
        *found = stream->piece;
        size = got;
    }
    stream->already = 0;
    stream->left -= size;
    return size;
}

static bool write_all(int file, const char *content, size_t size) {
    while (size > 0) {
        ssize_t written;
        MP_HAL_RETRY_SYSCALL(written, write(file, content, size), );
        if (written <= 0) {
            return false;
        }
        content += written;
        size -= written;
    }
    return true;
}

// Make an empty file, a directory or a link.  Return an open file or 0, -1 if it fails.
static int make(int folder, const char *name, char kind, const char *target) {
    switch (kind) {
        case 'f':
            return openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        case 'd':
            return mkdirat(folder, name, 0700);
        default:
            return symlinkat(target, folder, name);
    }
}

// Give a new file its owner, mode and label where they differ: not every filesystem has
// them.  The owner comes first, because to change it clears set-user-ID.
static bool dress(int folder, const char *name, char kind, const mp_obj_t *args) {
    struct stat made;
    unsigned int mode = WORD(args[0]), uid = WORD(args[1]), gid = WORD(args[2]);
    size_t size;
    const char *label = mp_obj_str_get_data(args[3], &size);
    if (fstatat(folder, name, &made, AT_SYMLINK_NOFOLLOW) != 0) {
        return false;
    }
    if ((made.st_uid != uid || made.st_gid != gid)
        && fchownat(folder, name, uid, gid, AT_SYMLINK_NOFOLLOW) != 0) {
        return false;
    }
    if (kind != 'l' && (made.st_mode & 07777) != mode && fchmodat(folder, name, mode, 0) != 0) {
        return false;
    }
    if (size == 0) {
        return true;
    }
    bool labelled = fchdir(folder) == 0 && lsetxattr(name, LABEL, label, size, 0) == 0;
    int kept = errno;
    chdir("/");
    errno = kept;
    return labelled;
}

// Make a new file, directory or link of the guest: (port, bytes that were read from it
// already, bytes of content, path, kind, mode, uid, gid, label).  The content of a link is
// its target.  All content is taken from the port, also after a failure.  Return the status.
static mp_obj_t appliance_make(size_t count, const mp_obj_t *args) {
    (void)count;
    mp_buffer_info_t already;
    mp_get_buffer_raise(args[1], &already, MP_BUFFER_READ);
    struct stream stream = {
        .port = INT(args[0]), .read = already.buf, .already = already.len, .left = INT(args[2]),
    };
    char kind = *STR(args[4]), name[NAME_MAX + 1], target[PATH_MAX];
    int folder = open_folder(STR(args[3]), name), file = -1;
    int failure = folder < 0 ? errno : 0;
    if (failure == 0 && kind != 'l' && (file = make(folder, name, kind, NULL)) < 0) {
        failure = errno;
    }
    const char *piece;
    size_t size, length = 0;
    while ((size = next_piece(&stream, &piece)) > 0) {
        if (failure == 0 && kind == 'f') {
            failure = write_all(file, piece, size) ? 0 : errno;
        } else if (failure == 0 && length + size < sizeof(target)) {
            memcpy(target + length, piece, size);
            length += size;
        } else if (failure == 0) {
            failure = ENAMETOOLONG;
        }
    }
    target[length] = 0;
    if (failure == 0 && kind == 'l' && make(folder, name, kind, target) < 0) {
        failure = errno;
    }
    if (file > 0 && close(file) != 0 && failure == 0) {
        failure = errno;
    }
    if (failure == 0 && !dress(folder, name, kind, args + 5)) {
        failure = errno;
    }
    struct answer answer;
    begin_answer(&answer, sizeof(struct head) + DESCRIPTION_LIMIT);
    begin_part(&answer);
    if (failure == 0) {
        failure = describe_name(&answer, folder, name);
    }
    end_part(&answer, STATUS, failure);
    if (folder >= 0) {
        close(folder);
    }
    return mp_obj_new_bytes_from_vstr(&answer.bytes);
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(appliance_make_obj, 9, 9, appliance_make);

// Remove a file or link, or an empty directory.
static mp_obj_t appliance_remove(mp_obj_t path, mp_obj_t is_directory) {
    char name[NAME_MAX + 1];
    int folder = open_folder(STR(path), name);
    checked(folder);
    int result = unlinkat(folder, name, mp_obj_is_true(is_directory) ? AT_REMOVEDIR : 0);
    drop(folder);
    return done(result);
}
static MP_DEFINE_CONST_FUN_OBJ_2(appliance_remove_obj, appliance_remove);

static const mp_rom_map_elem_t appliance_globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR__appliance)},
    {MP_ROM_QSTR(MP_QSTR_content), MP_ROM_PTR(&appliance_content_obj)},
    {MP_ROM_QSTR(MP_QSTR_entries), MP_ROM_PTR(&appliance_entries_obj)},
    {MP_ROM_QSTR(MP_QSTR_is_sealed), MP_ROM_PTR(&appliance_is_sealed_obj)},
    {MP_ROM_QSTR(MP_QSTR_load_module), MP_ROM_PTR(&appliance_load_module_obj)},
    {MP_ROM_QSTR(MP_QSTR_make), MP_ROM_PTR(&appliance_make_obj)},
    {MP_ROM_QSTR(MP_QSTR_map), MP_ROM_PTR(&appliance_map_obj)},
    {MP_ROM_QSTR(MP_QSTR_mknod), MP_ROM_PTR(&appliance_mknod_obj)},
    {MP_ROM_QSTR(MP_QSTR_mount), MP_ROM_PTR(&appliance_mount_obj)},
    {MP_ROM_QSTR(MP_QSTR_reboot), MP_ROM_PTR(&appliance_reboot_obj)},
    {MP_ROM_QSTR(MP_QSTR_remove), MP_ROM_PTR(&appliance_remove_obj)},
    {MP_ROM_QSTR(MP_QSTR_reseed), MP_ROM_PTR(&appliance_reseed_obj)},
    {MP_ROM_QSTR(MP_QSTR_set_time), MP_ROM_PTR(&appliance_set_time_obj)},
    {MP_ROM_QSTR(MP_QSTR_statuses), MP_ROM_PTR(&appliance_statuses_obj)},
    {MP_ROM_QSTR(MP_QSTR_switch_root), MP_ROM_PTR(&appliance_switch_root_obj)},
    {MP_ROM_QSTR(MP_QSTR_umount), MP_ROM_PTR(&appliance_umount_obj)},
    {MP_ROM_QSTR(MP_QSTR_unmap), MP_ROM_PTR(&appliance_unmap_obj)},
};
static MP_DEFINE_CONST_DICT(appliance_globals, appliance_globals_table);
const mp_obj_module_t appliance_module = {
    .base = {&mp_type_module},
    .globals = (mp_obj_dict_t *)&appliance_globals,
};
MP_REGISTER_MODULE(MP_QSTR__appliance, appliance_module);
