# What of the unix port is built: an interpreter for one program, no console, no TLS.
PROG = python
FROZEN_MANIFEST = $(VARIANT_DIR)/manifest.py
# Debian's source has no micropython-lib, of which nothing is used but looked for.
MPY_LIB_DIR = $(TOP)

MICROPY_USE_READLINE = 0
MICROPY_PY_BTREE = 0
MICROPY_PY_FFI = 0
MICROPY_PY_JNI = 0
MICROPY_PY_SSL = 0
MICROPY_PY_TERMIOS = 0
MICROPY_PY_THREAD = 0
MICROPY_VFS_FAT = 0
MICROPY_VFS_LFS1 = 0
MICROPY_VFS_LFS2 = 0

LDFLAGS_EXTRA += -static -s
STRIP =
SIZE = true
