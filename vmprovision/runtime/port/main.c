// The guest agent's interpreter: MicroPython's unix port without a console, started
// as `python [-X heapsize=BYTES[k|m]] FILE|-c CODE [ARGUMENT...]`.  zipboot.py
// does all that is not memory.  Nothing of the environment decides where modules
// come from: as root it would be for others to choose what runs.

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "extmod/vfs.h"
#include "extmod/vfs_posix.h"
#include "py/builtin.h"
#include "py/cstack.h"
#include "py/gc.h"
#include "py/mphal.h"
#include "py/runtime.h"

// For hostile clients; see zipboot.py for what it takes in peace.
#define HEAP_SIZE (1024 * 1024)
#define SMALLEST_HEAP (64 * 1024)
#define STACK_SIZE (40000 * sizeof(void *))

static void print_to_stderr(void *env, const char *text, size_t size) {
    (void)env;
    while (size > 0) {
        ssize_t written = write(STDERR_FILENO, text, size);
        if (written < 0) {
            if (errno == EINTR) {
                continue;
            }
            return;
        }
        text += written;
        size -= written;
    }
}

const mp_print_t mp_stderr_print = {NULL, print_to_stderr};

void nlr_jump_fail(void *value) {
    (void)value;
    print_to_stderr(NULL, "python: fatal error\n", 20);
    _exit(70);
}

// The heap's size by `heapsize=BYTES[k|m]`; 0 where it is none.
static size_t parse_heap_size(const char *option) {
    static const char name[] = "heapsize=";
    if (strncmp(option, name, sizeof(name) - 1) != 0) {
        return 0;
    }
    char *unit;
    unsigned long number = strtoul(option + sizeof(name) - 1, &unit, 10);
    int shift = *unit == 'k' ? 10 : *unit == 'm' ? 20 : 0;
    if (shift) {
        unit++;
    }
    if (*unit || number > (unsigned long)(LONG_MAX >> shift) || number << shift < SMALLEST_HEAP) {
        return 0;
    }
    return number << shift;
}

static int exit_status(mp_obj_t error) {
    const mp_obj_type_t *type = mp_obj_get_type(error);
    if (!mp_obj_is_subclass_fast(MP_OBJ_FROM_PTR(type), MP_OBJ_FROM_PTR(&mp_type_SystemExit))) {
        mp_obj_print_exception(&mp_stderr_print, error);
        return 1;
    }
    mp_obj_t value = mp_obj_exception_get_value(error);
    mp_int_t status = 0;
    if (value != mp_const_none && !mp_obj_get_int_maybe(value, &status)) {
        mp_obj_print_helper(&mp_stderr_print, value, PRINT_STR);
        print_to_stderr(NULL, "\n", 1);
        status = 1;
    }
    return status & 0xff;
}

static int run(void) {
    nlr_buf_t nlr;
    if (nlr_push(&nlr) != 0) {
        return exit_status(MP_OBJ_FROM_PTR(nlr.ret_val));
    }
    mp_obj_t boot = mp_import_name(MP_QSTR_zipboot, mp_const_none, MP_OBJ_NEW_SMALL_INT(0));
    mp_call_function_0(mp_load_attr(boot, MP_QSTR_main));
    nlr_pop();
    return 0;
}

// Apart from main(), so that all that refers to the heap is below the top of the stack.
MP_NOINLINE static int start(char *program, char **words, size_t heap_size) {
    char *heap = malloc(heap_size);
    if (heap == NULL) {
        print_to_stderr(NULL, "python: no memory\n", 18);
        return 1;
    }
    gc_init(heap, heap + heap_size);
    mp_init();
    mp_obj_t root[] = {
        MP_OBJ_TYPE_GET_SLOT(&mp_type_vfs_posix, make_new)(&mp_type_vfs_posix, 0, 0, NULL),
        MP_OBJ_NEW_QSTR(MP_QSTR__slash_),
    };
    mp_vfs_mount(2, root, (mp_map_t *)&mp_const_empty_map);
    MP_STATE_VM(vfs_cur) = MP_STATE_VM(vfs_mount_table);
    mp_sys_path = mp_obj_new_list(0, NULL);
    mp_obj_list_append(mp_sys_path, MP_OBJ_NEW_QSTR(MP_QSTR__dot_frozen));
    mp_obj_list_init(MP_OBJ_TO_PTR(mp_sys_argv), 0);
    mp_obj_list_append(mp_sys_argv, mp_obj_new_str_from_cstr(program));
    for (; *words; words++) {
        mp_obj_list_append(mp_sys_argv, mp_obj_new_str_from_cstr(*words));
    }
    return run();
}

// Without SSE2 floats are computed with the precision that the x87 is set to: that of
// a double, as everywhere else, and not the 64 bits that it starts with.
static void set_float_precision(void) {
    #if defined(__i386__) && !defined(__SSE2__)
    unsigned short control;
    __asm__ volatile ("fnstcw %0" : "=m" (control));
    control = (control & ~0x300) | 0x200;
    __asm__ volatile ("fldcw %0" : : "m" (control));
    #endif
}

int main(int argc, char **argv) {
    mp_cstack_init_with_sp_here(STACK_SIZE);
    set_float_precision();
    signal(SIGPIPE, SIG_IGN);  // as in CPython, a peer that is gone is an error of one call
    size_t heap_size = HEAP_SIZE;
    char **words = argv + (argc > 0);
    if (*words && strcmp(*words, "-X") == 0) {
        heap_size = words[1] ? parse_heap_size(words[1]) : 0;
        if (heap_size == 0) {
            print_to_stderr(NULL, "python: -X takes heapsize=BYTES[k|m]\n", 37);
            return 2;
        }
        words += 2;
    }
    return start(argc > 0 ? argv[0] : "python", words, heap_size);
}
