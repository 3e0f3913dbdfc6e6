// What the agent asks of the kernel and MicroPython has not: the modules posix,
// signal and fcntl, with CPython's names and results as far as they go, and
// _guest with the rest.  One thread, so that a handler is the only surprise.

#define _GNU_SOURCE  // pipe2
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bindings.h"
#include "lib/uzlib/uzlib.h"
#include "py/mphal.h"

extern char **environ;

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

static const mp_rom_map_elem_t guest_globals_table[] = {
    {MP_ROM_QSTR(MP_QSTR___name__), MP_ROM_QSTR(MP_QSTR__guest)},
    {MP_ROM_QSTR(MP_QSTR_crc32), MP_ROM_PTR(&guest_crc32_obj)},
    {MP_ROM_QSTR(MP_QSTR_environment), MP_ROM_PTR(&guest_environment_obj)},
    {MP_ROM_QSTR(MP_QSTR_inflate), MP_ROM_PTR(&guest_inflate_obj)},
    {MP_ROM_QSTR(MP_QSTR_new_module), MP_ROM_PTR(&guest_new_module_obj)},
    {MP_ROM_QSTR(MP_QSTR_shutdown), MP_ROM_PTR(&guest_shutdown_obj)},
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
