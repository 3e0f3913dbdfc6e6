"""Debian's PostgreSQL, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require, require_root
from tests.server.libvirt_host import let_others_enter

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = "/usr/lib/postgresql"


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Give the URL of a database on a server of its own, which listens on a socket only."""
    require_root()
    found = sorted(Path(PROGRAMS).glob("*/bin/initdb")) if Path(PROGRAMS).is_dir() else []
    require(found, "PostgreSQL is not installed: apt-get install postgresql", optional=True)
    programs = found[-1].parent
    let_others_enter(folder)
    user = pwd.getpwnam("postgres")
    os.chown(folder, user.pw_uid, user.pw_gid)
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    cluster = folder / "cluster"
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    control = [*become, str(programs / "pg_ctl"), "-D", str(cluster), "-w", "-s"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    initdb = [*become, str(programs / "initdb"), "-A", "trust", "-N", "-E", "UTF8"]
    subprocess.run(
        [*initdb, "-D", cluster], check=True, capture_output=True, cwd=folder, env=environment
    )
    log = ["-l", str(folder / "log")]
    start = [*control, *log, "-o", options, "start"]
    subprocess.run(start, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        stop = [*control, "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, cwd=folder, env=environment)
        shutil.rmtree(cluster)
