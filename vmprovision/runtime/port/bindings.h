// How C functions are offered to Python here.

#include <errno.h>

#include "py/objstr.h"
#include "py/runtime.h"

static inline mp_obj_t checked(long result) {
    if (result < 0) {
        mp_raise_OSError(errno);
    }
    return mp_obj_new_int(result);
}

static inline mp_obj_t done(int result) {
    checked(result);
    return mp_const_none;
}

static inline mp_obj_t bytes_of(vstr_t *buffer, ssize_t size) {
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
