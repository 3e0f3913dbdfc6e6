// What the agent asks of the kernel and MicroPython has not: the modules posix,
// signal and fcntl, with CPython's names and results as far as they go, and
// _guest with the rest.  One thread, so that a handler is the only surprise.

#define _GNU_SOURCE  // O_PATH
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/uzlib/uzlib.h"
#include "py/mphal.h"
#include "py/objstr.h"
#include "py/runtime.h"

extern char **environ;

static mp_obj_t checked(long result) {
    if (result < 0) {
        mp_raise_OSError(errno);
    }
    return mp_obj_new_int(result);
}

static mp_obj_t done(int result) {
    checked(result);
    return mp_const_none;
}

static mp_obj_t bytes_of(vstr_t *buffer, ssize_t size) {
    checked(size);
    buffer->len = size;
    return mp_obj_new_bytes_from_vstr(buffer);
}

#define INT(object) mp_obj_get_int(object)
// Ids and masks use all 32 bits, which is more than a small int has everywhere.
#define WORD(object) ((unsigned int)mp_obj_get_int_truncated(object))
#define STR(object) mp_obj_str_get_str(object)

#define FUNCTION_0(name, expression) \
    static mp_obj_t name(void) { return expression; } \
    static MP_DEFINE_CONST_FUN_OBJ_0(name##_obj, name)
#define FUNCTION_1(name, expression) \
    static mp_obj_t name(mp_obj_t a) { return expression; } \
    static MP_DEFINE_CONST_FUN_OBJ_1(name##_obj, name)
#define FUNCTION_2(name, expression) \
    static mp_obj_t name(mp_obj_t a, mp_obj_t b) { return expression; } \
    static MP_DEFINE_CONST_FUN_OBJ_2(name##_obj, name)
#define FUNCTION_3(name, expression) \
    static mp_obj_t name(mp_obj_t a, mp_obj_t b, mp_obj_t c) { return expression; } \
    static MP_DEFINE_CONST_FUN_OBJ_3(name##_obj, name)

// --- posix: users -------------------------------------------------------------

FUNCTION_0(guest_getuid, mp_obj_new_int_from_uint(getuid()));
FUNCTION_0(guest_geteuid, mp_obj_new_int_from_uint(geteuid()));
FUNCTION_1(guest_setuid, done(setuid(WORD(a))));
FUNCTION_1(guest_setgid, done(setgid(WORD(a))));

static mp_obj_t guest_setgroups(mp_obj_t groups) {
    size_t count;
    mp_obj_t *items;
    mp_obj_get_array(groups, &count, &items);
    gid_t ids[count + 1];
    for (size_t i = 0; i < count; i++) {
        ids[i] = WORD(items[i]);
    }
    return done(setgroups(count, ids));
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_setgroups_obj, guest_setgroups);

// --- posix: files -------------------------------------------------------------

FUNCTION_2(guest_chmod, done(chmod(STR(a), INT(b))));
FUNCTION_3(guest_chown, done(chown(STR(a), WORD(b), WORD(c))));
FUNCTION_2(guest_symlink, done(symlink(STR(a), STR(b))));
FUNCTION_1(guest_umask, MP_OBJ_NEW_SMALL_INT(umask(INT(a))));
FUNCTION_1(guest_close, done(close(INT(a))));
FUNCTION_2(guest_dup2, checked(dup2(INT(a), INT(b))));

static mp_obj_t guest_open(size_t count, const mp_obj_t *args) {
    return checked(open(STR(args[0]), INT(args[1]) | O_CLOEXEC, count > 2 ? INT(args[2]) : 0777));
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(guest_open_obj, 2, 3, guest_open);

static mp_obj_t guest_read(mp_obj_t descriptor, mp_obj_t limit) {
    vstr_t buffer;
    vstr_init_len(&buffer, INT(limit));
    ssize_t size;
    MP_HAL_RETRY_SYSCALL(size, read(INT(descriptor), buffer.buf, buffer.len), break);
    return bytes_of(&buffer, size);
}
static MP_DEFINE_CONST_FUN_OBJ_2(guest_read_obj, guest_read);

static mp_obj_t guest_write(mp_obj_t descriptor, mp_obj_t content) {
    mp_buffer_info_t buffer;
    mp_get_buffer_raise(content, &buffer, MP_BUFFER_READ);
    ssize_t size;
    MP_HAL_RETRY_SYSCALL(size, write(INT(descriptor), buffer.buf, buffer.len), break);
    return checked(size);
}
static MP_DEFINE_CONST_FUN_OBJ_2(guest_write_obj, guest_write);

static mp_obj_t guest_closerange(mp_obj_t first, mp_obj_t end) {
    for (int descriptor = INT(first); descriptor < INT(end); descriptor++) {
        close(descriptor);
    }
    return mp_const_none;
}
static MP_DEFINE_CONST_FUN_OBJ_2(guest_closerange_obj, guest_closerange);

static mp_obj_t guest_pipe(void) {
    int ends[2];
    checked(pipe2(ends, O_CLOEXEC));
    mp_obj_t both[] = {MP_OBJ_NEW_SMALL_INT(ends[0]), MP_OBJ_NEW_SMALL_INT(ends[1])};
    return mp_obj_new_tuple(2, both);
}
static MP_DEFINE_CONST_FUN_OBJ_0(guest_pipe_obj, guest_pipe);

static mp_obj_t guest_readlink(mp_obj_t path) {
    vstr_t buffer;
    vstr_init_len(&buffer, 4096);
    ssize_t size = readlink(STR(path), buffer.buf, buffer.len);
    checked(size);
    buffer.len = size;
    return mp_obj_new_str_from_vstr(&buffer);
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_readlink_obj, guest_readlink);

static mp_obj_t guest_statvfs(mp_obj_t path) {
    struct statvfs found;
    checked(statvfs(STR(path), &found));
    mp_obj_t fields[] = {
        mp_obj_new_int_from_ull(found.f_bsize),
        mp_obj_new_int_from_ull(found.f_frsize),
        mp_obj_new_int_from_ull(found.f_blocks),
        mp_obj_new_int_from_ull(found.f_bfree),
        mp_obj_new_int_from_ull(found.f_bavail),
        mp_obj_new_int_from_ull(found.f_files),
        mp_obj_new_int_from_ull(found.f_ffree),
        mp_obj_new_int_from_ull(found.f_favail),
        mp_obj_new_int_from_ull(found.f_flag),
        mp_obj_new_int_from_ull(found.f_namemax),
    };
    return mp_obj_new_tuple(MP_ARRAY_SIZE(fields), fields);
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_statvfs_obj, guest_statvfs);

static mp_obj_t guest_strerror(mp_obj_t number) {
    return mp_obj_new_str_from_cstr(strerror(INT(number)));
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_strerror_obj, guest_strerror);

static mp_obj_t guest_uname(void) {
    struct utsname found;
    done(uname(&found));
    mp_obj_t fields[] = {
        mp_obj_new_str_from_cstr(found.sysname),
        mp_obj_new_str_from_cstr(found.nodename),
        mp_obj_new_str_from_cstr(found.release),
        mp_obj_new_str_from_cstr(found.version),
        mp_obj_new_str_from_cstr(found.machine),
    };
    return mp_obj_new_tuple(MP_ARRAY_SIZE(fields), fields);
}
static MP_DEFINE_CONST_FUN_OBJ_0(guest_uname_obj, guest_uname);

// --- posix: programs ----------------------------------------------------------

FUNCTION_0(guest_getpid, mp_obj_new_int(getpid()));
FUNCTION_0(guest_fork, checked(fork()));
FUNCTION_2(guest_kill, done(kill(INT(a), INT(b))));
FUNCTION_2(guest_killpg, done(killpg(INT(a), INT(b))));
FUNCTION_2(guest_setpgid, done(setpgid(INT(a), INT(b))));
FUNCTION_1(guest_WIFEXITED, mp_obj_new_bool(WIFEXITED(INT(a))));
FUNCTION_1(guest_WEXITSTATUS, MP_OBJ_NEW_SMALL_INT(WEXITSTATUS(INT(a))));

static mp_obj_t guest__exit(mp_obj_t status) {
    _exit(INT(status));
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest__exit_obj, guest__exit);

static mp_obj_t guest_waitpid(mp_obj_t child, mp_obj_t options) {
    int status = 0;
    pid_t pid;
    MP_HAL_RETRY_SYSCALL(pid, waitpid(INT(child), &status, INT(options)), break);
    mp_obj_t both[] = {checked(pid), MP_OBJ_NEW_SMALL_INT(status)};
    return mp_obj_new_tuple(2, both);
}
static MP_DEFINE_CONST_FUN_OBJ_2(guest_waitpid_obj, guest_waitpid);

// os.environ: a new dictionary of the variables that are set.
static mp_obj_t guest_environment(void) {
    mp_obj_t variables = mp_obj_new_dict(0);
    for (char **variable = environ; variable && *variable; variable++) {
        const char *equals = strchr(*variable, '=');
        if (equals) {
            mp_obj_dict_store(variables, mp_obj_new_str(*variable, equals - *variable),
                mp_obj_new_str_from_cstr(equals + 1));
        }
    }
    return variables;
}
static MP_DEFINE_CONST_FUN_OBJ_0(guest_environment_obj, guest_environment);

static mp_obj_t guest_execvpe(mp_obj_t program, mp_obj_t words, mp_obj_t variables) {
    size_t count;
    mp_obj_t *items;
    mp_obj_get_array(words, &count, &items);
    char **argv = m_new0(char *, count + 1);
    for (size_t i = 0; i < count; i++) {
        argv[i] = (char *)STR(items[i]);
    }
    mp_map_t *map = mp_obj_dict_get_map(variables);
    char **envp = m_new0(char *, map->used + 1);
    for (size_t slot = 0, i = 0; slot < map->alloc; slot++) {
        if (mp_map_slot_is_filled(map, slot)) {
            vstr_t text;
            vstr_init(&text, 64);
            vstr_add_str(&text, STR(map->table[slot].key));
            vstr_add_char(&text, '=');
            vstr_add_str(&text, STR(map->table[slot].value));
            envp[i++] = vstr_null_terminated_str(&text);
        }
    }
    char **former = environ;
    environ = envp;  // its PATH is where the program is looked for
    execvp(STR(program), argv);
    environ = former;
    mp_raise_OSError(errno);
}
static MP_DEFINE_CONST_FUN_OBJ_3(guest_execvpe_obj, guest_execvpe);

static const mp_rom_map_elem_t posix_globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_posix)},
    {MP_ROM_QSTR(MP_QSTR_getuid), MP_ROM_PTR(&guest_getuid_obj)},
    {MP_ROM_QSTR(MP_QSTR_geteuid), MP_ROM_PTR(&guest_geteuid_obj)},
    {MP_ROM_QSTR(MP_QSTR_setuid), MP_ROM_PTR(&guest_setuid_obj)},
    {MP_ROM_QSTR(MP_QSTR_setgid), MP_ROM_PTR(&guest_setgid_obj)},
    {MP_ROM_QSTR(MP_QSTR_setgroups), MP_ROM_PTR(&guest_setgroups_obj)},
    {MP_ROM_QSTR(MP_QSTR_chmod), MP_ROM_PTR(&guest_chmod_obj)},
    {MP_ROM_QSTR(MP_QSTR_chown), MP_ROM_PTR(&guest_chown_obj)},
    {MP_ROM_QSTR(MP_QSTR_symlink), MP_ROM_PTR(&guest_symlink_obj)},
    {MP_ROM_QSTR(MP_QSTR_umask), MP_ROM_PTR(&guest_umask_obj)},
    {MP_ROM_QSTR(MP_QSTR_open), MP_ROM_PTR(&guest_open_obj)},
    {MP_ROM_QSTR(MP_QSTR_read), MP_ROM_PTR(&guest_read_obj)},
    {MP_ROM_QSTR(MP_QSTR_write), MP_ROM_PTR(&guest_write_obj)},
    {MP_ROM_QSTR(MP_QSTR_close), MP_ROM_PTR(&guest_close_obj)},
    {MP_ROM_QSTR(MP_QSTR_closerange), MP_ROM_PTR(&guest_closerange_obj)},
    {MP_ROM_QSTR(MP_QSTR_dup2), MP_ROM_PTR(&guest_dup2_obj)},
    {MP_ROM_QSTR(MP_QSTR_pipe), MP_ROM_PTR(&guest_pipe_obj)},
    {MP_ROM_QSTR(MP_QSTR_readlink), MP_ROM_PTR(&guest_readlink_obj)},
    {MP_ROM_QSTR(MP_QSTR_statvfs), MP_ROM_PTR(&guest_statvfs_obj)},
    {MP_ROM_QSTR(MP_QSTR_uname), MP_ROM_PTR(&guest_uname_obj)},
    {MP_ROM_QSTR(MP_QSTR_strerror), MP_ROM_PTR(&guest_strerror_obj)},
    {MP_ROM_QSTR(MP_QSTR_getpid), MP_ROM_PTR(&guest_getpid_obj)},
    {MP_ROM_QSTR(MP_QSTR_fork), MP_ROM_PTR(&guest_fork_obj)},
    {MP_ROM_QSTR(MP_QSTR_kill), MP_ROM_PTR(&guest_kill_obj)},
    {MP_ROM_QSTR(MP_QSTR_killpg), MP_ROM_PTR(&guest_killpg_obj)},
    {MP_ROM_QSTR(MP_QSTR_setpgid), MP_ROM_PTR(&guest_setpgid_obj)},
    {MP_ROM_QSTR(MP_QSTR_waitpid), MP_ROM_PTR(&guest_waitpid_obj)},
    {MP_ROM_QSTR(MP_QSTR_WIFEXITED), MP_ROM_PTR(&guest_WIFEXITED_obj)},
    {MP_ROM_QSTR(MP_QSTR_WEXITSTATUS), MP_ROM_PTR(&guest_WEXITSTATUS_obj)},
    {MP_ROM_QSTR(MP_QSTR__exit), MP_ROM_PTR(&guest__exit_obj)},
    {MP_ROM_QSTR(MP_QSTR_execvpe), MP_ROM_PTR(&guest_execvpe_obj)},
    {MP_ROM_QSTR(MP_QSTR_O_WRONLY), MP_ROM_INT(O_WRONLY)},
    {MP_ROM_QSTR(MP_QSTR_O_NONBLOCK), MP_ROM_INT(O_NONBLOCK)},
    {MP_ROM_QSTR(MP_QSTR_WNOHANG), MP_ROM_INT(WNOHANG)},
};
static MP_DEFINE_CONST_DICT(posix_globals, posix_globals_table);
const mp_obj_module_t posix_module = {
    .base = {&mp_type_module},
    .globals = (mp_obj_dict_t *)&posix_globals,
};
MP_REGISTER_MODULE(MP_QSTR_posix, posix_module);

// --- signal -------------------------------------------------------------------

// Python code cannot run in a signal handler.  The signal's number goes into the pipe
// that set_wakeup_fd() named, as CPython does it too; to act upon it is left to
// whoever reads that.
static volatile sig_atomic_t wakeup = -1;

static void tell(int number) {
    int kept = errno;
    unsigned char byte = number;
    if (wakeup >= 0 && write(wakeup, &byte, 1) < 0) {
        // full: whoever reads it wakes up anyway
    }
    errno = kept;
}

static mp_obj_t guest_set_wakeup_fd(mp_obj_t descriptor) {
    int former = wakeup;
    wakeup = INT(descriptor);
    return MP_OBJ_NEW_SMALL_INT(former);
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_set_wakeup_fd_obj, guest_set_wakeup_fd);

// SIG_DFL, SIG_IGN, or any function: the signal is then told through the pipe.
static mp_obj_t guest_signal(mp_obj_t number, mp_obj_t action) {
    struct sigaction wanted;
    memset(&wanted, 0, sizeof(wanted));
    sigemptyset(&wanted.sa_mask);
    if (action == MP_OBJ_NEW_SMALL_INT(0)) {
        wanted.sa_handler = SIG_DFL;
    } else if (action == MP_OBJ_NEW_SMALL_INT(1)) {
        wanted.sa_handler = SIG_IGN;
    } else {
        wanted.sa_handler = tell;
    }
    return done(sigaction(INT(number), &wanted, NULL));
}
static MP_DEFINE_CONST_FUN_OBJ_2(guest_signal_obj, guest_signal);

static const mp_rom_map_elem_t signal_globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_signal)},
    {MP_ROM_QSTR(MP_QSTR_signal), MP_ROM_PTR(&guest_signal_obj)},
    {MP_ROM_QSTR(MP_QSTR_set_wakeup_fd), MP_ROM_PTR(&guest_set_wakeup_fd_obj)},
    {MP_ROM_QSTR(MP_QSTR_SIG_DFL), MP_ROM_INT(0)},
    {MP_ROM_QSTR(MP_QSTR_SIG_IGN), MP_ROM_INT(1)},
    {MP_ROM_QSTR(MP_QSTR_SIGHUP), MP_ROM_INT(SIGHUP)},
    {MP_ROM_QSTR(MP_QSTR_SIGINT), MP_ROM_INT(SIGINT)},
    {MP_ROM_QSTR(MP_QSTR_SIGKILL), MP_ROM_INT(SIGKILL)},
    {MP_ROM_QSTR(MP_QSTR_SIGPIPE), MP_ROM_INT(SIGPIPE)},
    {MP_ROM_QSTR(MP_QSTR_SIGTERM), MP_ROM_INT(SIGTERM)},
};
static MP_DEFINE_CONST_DICT(signal_globals, signal_globals_table);
const mp_obj_module_t signal_module = {
    .base = {&mp_type_module},
    .globals = (mp_obj_dict_t *)&signal_globals,
};
MP_REGISTER_MODULE(MP_QSTR_signal, signal_module);

// --- fcntl --------------------------------------------------------------------

static mp_obj_t guest_fcntl(size_t count, const mp_obj_t *args) {
    return checked(fcntl(INT(args[0]), INT(args[1]), count > 2 ? INT(args[2]) : 0));
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(guest_fcntl_obj, 2, 3, guest_fcntl);

static const mp_rom_map_elem_t fcntl_globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR_fcntl)},
    {MP_ROM_QSTR(MP_QSTR_fcntl), MP_ROM_PTR(&guest_fcntl_obj)},
    {MP_ROM_QSTR(MP_QSTR_F_GETFD), MP_ROM_INT(F_GETFD)},
    {MP_ROM_QSTR(MP_QSTR_F_SETFD), MP_ROM_INT(F_SETFD)},
    {MP_ROM_QSTR(MP_QSTR_F_GETFL), MP_ROM_INT(F_GETFL)},
    {MP_ROM_QSTR(MP_QSTR_F_SETFL), MP_ROM_INT(F_SETFL)},
    {MP_ROM_QSTR(MP_QSTR_FD_CLOEXEC), MP_ROM_INT(FD_CLOEXEC)},
};
static MP_DEFINE_CONST_DICT(fcntl_globals, fcntl_globals_table);
const mp_obj_module_t fcntl_module = {
    .base = {&mp_type_module},
    .globals = (mp_obj_dict_t *)&fcntl_globals,
};
MP_REGISTER_MODULE(MP_QSTR_fcntl, fcntl_module);

// --- _guest -------------------------------------------------------------------

FUNCTION_2(guest_shutdown, done(shutdown(INT(a), INT(b))));
// An empty module that can be imported by its name from now on.
FUNCTION_1(guest_new_module, mp_obj_new_module(mp_obj_str_get_qstr(a)));

static mp_obj_t guest_crc32(mp_obj_t content) {
    mp_buffer_info_t buffer;
    mp_get_buffer_raise(content, &buffer, MP_BUFFER_READ);
    return mp_obj_new_int_from_uint(~uzlib_crc32(buffer.buf, buffer.len, 0xffffffff) & 0xffffffff);
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_crc32_obj, guest_crc32);

// The first `size` bytes of what was deflated (RFC 1951), in one piece, so that
// no window of 32 KiB has to be found in a small heap.
static mp_obj_t guest_inflate(mp_obj_t packed, mp_obj_t size) {
    mp_buffer_info_t buffer;
    mp_get_buffer_raise(packed, &buffer, MP_BUFFER_READ);
    vstr_t content;
    vstr_init_len(&content, INT(size));
    uzlib_uncomp_t *state = m_new0(uzlib_uncomp_t, 1);
    uzlib_uncompress_init(state, NULL, 0);
    state->source = buffer.buf;
    state->source_limit = state->source + buffer.len;
    state->dest_start = state->dest = (unsigned char *)content.buf;
    state->dest_limit = state->dest + content.len;
    if (content.len > 0 && (uzlib_uncompress(state) < 0 || state->dest != state->dest_limit)) {
        mp_raise_ValueError(MP_ERROR_TEXT("damaged deflate stream"));
    }
    m_del(uzlib_uncomp_t, state, 1);
    return mp_obj_new_bytes_from_vstr(&content);
}
static MP_DEFINE_CONST_FUN_OBJ_2(guest_inflate_obj, guest_inflate);

// The appliance that vmprovision restores from a saved state asks for these six.
static mp_obj_t guest_mount(size_t count, const mp_obj_t *args) {
    (void)count;
    const char *options = mp_obj_is_true(args[4]) ? STR(args[4]) : NULL;
    return done(mount(STR(args[0]), STR(args[1]), STR(args[2]), WORD(args[3]), options));
}
static MP_DEFINE_CONST_FUN_OBJ_VAR_BETWEEN(guest_mount_obj, 5, 5, guest_mount);

FUNCTION_1(guest_umount, done(umount(STR(a))));

static mp_obj_t guest_set_time(mp_obj_t seconds) {
    struct timeval now = {.tv_sec = mp_obj_get_int(seconds)};
    return done(settimeofday(&now, NULL));
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_set_time_obj, guest_set_time);

// As linux/random.h has them, which musl's compiler does not find.
#define RNDADDENTROPY _IOW('R', 0x03, int[2])
#define RNDRESEEDCRNG _IO('R', 0x07)

// New random bytes for the kernel's generator (random(4)), in use from the next read on.
static mp_obj_t guest_reseed(mp_obj_t entropy) {
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
    close(device);
    return done(failed ? -1 : 0);
}
static MP_DEFINE_CONST_FUN_OBJ_1(guest_reseed_obj, guest_reseed);

// Open a path of which no component is a link.
static int open_without_links(const char *path, int flags) {
    int at = open("/", O_PATH | O_CLOEXEC);
    while (at >= 0) {
        path += strspn(path, "/");
        size_t length = strcspn(path, "/");
        char name[NAME_MAX + 1] = ".";
        bool is_last = path[length + strspn(path + length, "/")] == 0;
        if (length <= NAME_MAX) {
            memcpy(name, path, length);
        }
        int how = (is_last ? flags : O_PATH | O_DIRECTORY) | O_NOFOLLOW | O_CLOEXEC;
        int next = length <= NAME_MAX ? openat(at, name, how) : (errno = ENAMETOOLONG, -1);
        int failure = errno;
        close(at);
        if (is_last || next < 0) {
            errno = failure;
            return next;
        }
        at = next;
        path += length;
    }
    return at;
}

// At most `size` bytes of a regular file, from `place` on.
static mp_obj_t guest_content(mp_obj_t path, mp_obj_t place, mp_obj_t size) {
    vstr_t buffer;
    vstr_init_len(&buffer, INT(size));
    int file = open_without_links(STR(path), O_RDONLY | O_NONBLOCK | O_NOCTTY);
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
    int failure = errno;
    close(file);
    errno = failure;
    return bytes_of(&buffer, found);
}
static MP_DEFINE_CONST_FUN_OBJ_3(guest_content_obj, guest_content);

// What follows the names of a directory, for itself and for each of them: all zero where
// it cannot be read.  Behind it stands the target of a link.
struct __attribute__((packed)) described { uint32_t mode, links, uid, gid, target; uint64_t size; };
#define DESCRIPTION_LIMIT (sizeof(struct described) + PATH_MAX)

static void describe(vstr_t *found, int folder, const char *name) {
    struct described entry = {0};
    char target[PATH_MAX];
    struct stat status;
    if (fstatat(folder, name, &status, AT_SYMLINK_NOFOLLOW) == 0) {
        entry = (struct described) {
            .mode = status.st_mode, .links = status.st_nlink, .uid = status.st_uid,
            .gid = status.st_gid, .size = status.st_size,
        };
        if (S_ISLNK(status.st_mode)) {
            ssize_t length = readlinkat(folder, name, target, sizeof(target));
            entry.target = length > 0 ? length : 0;
        }
    }
    vstr_add_strn(found, (const char *)&entry, sizeof(entry));
    vstr_add_strn(found, target, entry.target);
}

// Add the names in a directory, each with a NUL behind it, and their descriptions unless
// there are more than `known`.  Return an errno.
static int add_entries(vstr_t *found, const char *path, size_t known, size_t end) {
    int folder = open_without_links(path, O_RDONLY | O_DIRECTORY);
    DIR *stream = folder < 0 ? NULL : fdopendir(folder);
    if (stream == NULL) {
        int failure = errno;
        close(folder);
        return failure;
    }
    size_t begun = found->len, count = 0;
    struct dirent *entry;
    while (errno = 0, (entry = readdir(stream)) != NULL && found->len + NAME_MAX < end) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            vstr_add_strn(found, entry->d_name, strlen(entry->d_name) + 1);
            count++;
        }
    }
    int failure = entry == NULL ? errno : E2BIG;
    vstr_add_byte(found, 0);
    for (size_t place = begun; failure == 0 && count <= known; ) {
        if (found->len + DESCRIPTION_LIMIT > end) {
            failure = E2BIG;
        } else {
            size_t length = strlen(found->buf + place);
            describe(found, folder, length ? found->buf + place : ".");
            place += length + 1;
            if (length == 0) {
                break;
            }
        }
    }
    closedir(stream);
    return failure;
}

// What these directories hold, in at most `room` bytes: for each an errno and how many bytes
// follow.  The last of the descriptions is the directory's own.
static mp_obj_t guest_entries(mp_obj_t paths, mp_obj_t known, mp_obj_t room) {
    size_t count;
    mp_obj_t *items;
    mp_obj_get_array(paths, &count, &items);
    uint32_t head[2];
    size_t end = INT(room);
    vstr_t found;
    vstr_init(&found, end + count * sizeof(head) + 1);  // so it never moves
    for (size_t i = 0; i < count; i++) {
        size_t begun = found.len;
        vstr_add_len(&found, sizeof(head));
        head[0] = add_entries(&found, STR(items[i]), INT(known), end);
        if (head[0] != 0) {
            found.len = begun + sizeof(head);
        }
        head[1] = found.len - begun - sizeof(head);
        memcpy(found.buf + begun, head, sizeof(head));
    }
    return mp_obj_new_bytes_from_vstr(&found);
}
static MP_DEFINE_CONST_FUN_OBJ_3(guest_entries_obj, guest_entries);

static const mp_rom_map_elem_t guest_globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR__guest)},
    {MP_ROM_QSTR(MP_QSTR_content), MP_ROM_PTR(&guest_content_obj)},
    {MP_ROM_QSTR(MP_QSTR_crc32), MP_ROM_PTR(&guest_crc32_obj)},
    {MP_ROM_QSTR(MP_QSTR_entries), MP_ROM_PTR(&guest_entries_obj)},
    {MP_ROM_QSTR(MP_QSTR_environment), MP_ROM_PTR(&guest_environment_obj)},
    {MP_ROM_QSTR(MP_QSTR_inflate), MP_ROM_PTR(&guest_inflate_obj)},
    {MP_ROM_QSTR(MP_QSTR_mount), MP_ROM_PTR(&guest_mount_obj)},
    {MP_ROM_QSTR(MP_QSTR_new_module), MP_ROM_PTR(&guest_new_module_obj)},
    {MP_ROM_QSTR(MP_QSTR_reseed), MP_ROM_PTR(&guest_reseed_obj)},
    {MP_ROM_QSTR(MP_QSTR_set_time), MP_ROM_PTR(&guest_set_time_obj)},
    {MP_ROM_QSTR(MP_QSTR_shutdown), MP_ROM_PTR(&guest_shutdown_obj)},
    {MP_ROM_QSTR(MP_QSTR_umount), MP_ROM_PTR(&guest_umount_obj)},
};
static MP_DEFINE_CONST_DICT(guest_globals, guest_globals_table);
const mp_obj_module_t guest_module = {
    .base = {&mp_type_module},
    .globals = (mp_obj_dict_t *)&guest_globals,
};
MP_REGISTER_MODULE(MP_QSTR__guest, guest_module);

// uzlib is a library of sources that whoever needs it compiles in.
#include "lib/uzlib/crc32.c"
#include "lib/uzlib/tinflate.c"
