# What is compiled into the interpreter beside its own modules.
module("os.py", base_path="$(PORT_DIR)/variants/guest", opt=3)
module("zipboot.py", base_path="$(PORT_DIR)/variants/guest", opt=3)
