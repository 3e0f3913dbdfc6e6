// Zig's C library asks for atomic operations that ARM processors before ARMv6 have
// no instructions for.  This program has one thread.

#if defined(__arm__) && __ARM_ARCH < 6

#include <stdint.h>

#define OPERATIONS(bytes, type) \
    type compare_and_swap_##bytes(volatile type *, type, type) \
        __asm__("__sync_val_compare_and_swap_" #bytes); \
    type compare_and_swap_##bytes(volatile type *place, type expected, type wanted) { \
        type found = *place; \
        if (found == expected) { \
            *place = wanted; \
        } \
        return found; \
    } \
    type swap_##bytes(volatile type *, type) __asm__("__sync_lock_test_and_set_" #bytes); \
    type swap_##bytes(volatile type *place, type wanted) { \
        type found = *place; \
        *place = wanted; \
        return found; \
    }

OPERATIONS(1, uint8_t)
OPERATIONS(4, uint32_t)

#endif
