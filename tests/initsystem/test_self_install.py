"""``guest-agent install`` and ``uninstall``, in namespaces with their own process 1 and files.

``tests/proof`` boots guests that do it under systemd and sysvinit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from pathlib import Path

PREPARE = """\
set -e
mount -t tmpfs none /usr/local
mount -t tmpfs none /run
mount -t tmpfs none /var/log
mount -t tmpfs none /etc
ip link set lo up
echo nobody:x:65534:65534:nobody:/:/bin/sh >/etc/passwd
printf '#!/bin/sh\\ntrue\\nexit 0{end}\\n' >/etc/rc.local
chmod {mode} /etc/rc.local
mkdir -p /usr/local/bin
{foreign}
"""
FOREIGN = """\
echo mine >/usr/local/bin/guest-agent
chmod 0750 /usr/local/bin/guest-agent
"""
ORDERS = """\
answers() {{
  python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8080), 1)' 2>/dev/null
}}
wait_for() {{
  for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    if answers; then found=yes; else found=no; fi
    [ $found != "$1" ] || break
    sleep 0.5
  done
  echo "answers: $found"
}}
list() {{  # without utmp, which BusyBox's init may write at any moment
  find /usr/local /etc /var/log /run -type f ! -name '*.log' ! -path /run/utmp |
    sort | sed 's/^/file: /'
}}
cd {folder}
sha256sum /etc/rc.local /etc/inittab 2>/dev/null >before
cp /etc/rc.local /etc/inittab . 2>/dev/null
./guest-agent install; echo "status: $?"
wait_for yes
list
grep -c 'BEGIN guest-agent' /etc/rc.local /etc/inittab 2>/dev/null
stat -c %a /etc/rc.local
/usr/local/bin/guest-agent install; echo "status: $?"
grep -c 'BEGIN guest-agent' /etc/rc.local /etc/inittab 2>/dev/null
wait_for yes
/usr/local/bin/guest-agent uninstall; echo "status: $?"
wait_for no
list
sha256sum -c --quiet before && echo as before
./guest-agent uninstall; echo "status: $?"
"""


def run_under(  # noqa: PLR0913 -- all but two have a default
    init: str,
    folder: Path,
    *,
    wanted: str = ORDERS,
    end: str = "",
    mode: str = "0700",
    foreign: str = "",
) -> str:
    """Run the commands under this process 1 and return their output."""
    prepare = PREPARE.format(end=end, mode=mode, foreign=foreign)
    agent = folder / "guest-agent"
    agent.write_bytes(build_archive().content)
    agent.chmod(0o755)
    orders = folder / "orders"
    orders.write_text(wanted.format(folder=folder))
    if init == "busybox":
        inittab = f"::once:/bin/sh -c '/bin/sh {orders} >{folder}/said 2>&1; touch {folder}/done'"
        start = f'echo "{inittab}" >/etc/inittab\nexec busybox init\n'
    else:
        start = f"/bin/sh {orders} >{folder}/said 2>&1; touch {folder}/done\n"
    argv = [
        "unshare",
        "-mnp",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        prepare + start,
    ]
    run = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=(folder / "err").open("wb"))
    try:
        for _ in range(600):
            if (folder / "done").exists():
                break
            try:
                run.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            break
    finally:
        run.kill()
        run.wait()
    assert (folder / "done").exists(), (folder / "err").read_text()
    return (folder / "said").read_text()


def require_namespaces() -> None:
    """Skip the test where namespaces cannot be made."""
    usable = subprocess.run(["unshare", "-mnp", "--fork", "true"], check=False).returncode == 0
    require(os.geteuid() == 0 and usable, "only root can make namespaces")


@pytest.mark.parametrize("init", ["busybox", "standalone"])
def test_an_agent_installs_and_uninstalls_itself(init: str, tmp_path: Path) -> None:
    """It answers after install, a second install changes nothing, and uninstall leaves nothing."""
    require_namespaces()
    require(init != "busybox" or shutil.which("busybox"), "busybox is not installed")
    said = run_under(init, tmp_path).splitlines()
    assert [line for line in said if line.startswith("guest-agent: ")] == [
        f"guest-agent: installed ({init}), settings in /etc/guest-agent.conf",
        f"guest-agent: installed ({init}), settings in /etc/guest-agent.conf",
        f"guest-agent: uninstalled ({init})",
        "guest-agent: nothing is installed here: there is no /usr/local/lib/guest-agent/installed",
    ]
    assert [line for line in said if line.startswith("status: ")] == [
        *["status: 0"] * 3,
        "status: 1",
    ]
    assert [line for line in said if line.startswith("answers: ")] == [
        "answers: yes",
        "answers: yes",
        "answers: no",
    ]
    files = [line.removeprefix("file: ") for line in said if line.startswith("file: ")]
    there = ["/etc/inittab"] * (init == "busybox") + ["/etc/passwd", "/etc/rc.local"]
    edited = "/etc/inittab" if init == "busybox" else "/etc/rc.local"
    assert files == [
        "/etc/guest-agent.conf",
        *there,
        "/usr/local/bin/guest-agent",
        "/usr/local/lib/guest-agent/installed",
        f"/usr/local/lib/guest-agent/set-aside/{edited[1:].replace('/', '%')}",
        *there,
    ]
    assert said.count(f"{edited}:1") == 2
    assert "as before" in said


FOREIGN_ORDERS = """\
cd {folder}
show() {{
  (cd /; find usr/local etc var/log run -type f -o -type l) | sort | while read -r each; do
    stat -c '%n %a %s' "/$each"
  done
}}
show >before
cp /etc/rc.local rc.local
./guest-agent install; echo "status: $?"
tail -n 1 /etc/rc.local
/usr/local/bin/guest-agent --version
tail -f /usr/local/bin/guest-agent >/dev/null 2>&1 & other=$!
./guest-agent install; echo "status: $?"
/usr/local/bin/guest-agent uninstall; echo "status: $?"
kill $other && echo the other lives
show | diff before - && echo as before
cat /usr/local/bin/guest-agent
cmp rc.local /etc/rc.local && echo the same
"""


@pytest.mark.parametrize(("end", "mode"), [(" # done", "0644"), ("; # x", "0755")])
def test_what_was_there_is_kept(end: str, mode: str, tmp_path: Path) -> None:
    """A foreign file at the agent's path and rc.local are restored, with their modes."""
    require_namespaces()
    said = run_under(
        "standalone", tmp_path, wanted=FOREIGN_ORDERS, end=end, mode=mode, foreign=FOREIGN
    ).splitlines()
    assert [line for line in said if line.startswith("status: ")] == ["status: 0"] * 3
    assert f"exit 0{end}" in said  # which the block stands before
    assert [line for line in said if line.startswith("guest-agent 0.")]
    assert said[-4:] == ["the other lives", "as before", "mine", "the same"]


NOT_RUNNING = """\
cd {folder}
{{ python3 -c 'import socket,time
s = socket.create_server(("", 8080)); time.sleep(60)' & }}
taken=$!
until python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8080), 1)' 2>/dev/null
do sleep 0.2; done
./guest-agent install; echo "status: $?"
find /usr/local /etc -name '*guest-agent*'
kill $taken; wait $taken 2>/dev/null
mount -o remount,noexec /usr/local
./guest-agent install; echo "status: $?"
mount -o remount,exec /usr/local
/usr/local/bin/guest-agent uninstall; echo "status: $?"
find /usr/local -type f
"""


def test_an_agent_that_does_not_run_is_reported(tmp_path: Path) -> None:
    """A port in use changes nothing; an agent that does not start gives status 1."""
    require_namespaces()
    said = run_under("standalone", tmp_path, wanted=NOT_RUNNING).splitlines()
    assert said == [
        (
            "guest-agent: the agent cannot listen on port 8080 (Address already in use): "
            "stop what does, or set PORT in /etc/guest-agent.conf"
        ),
        "status: 1",
        "guest-agent: installed, but it does not run: see its log, /var/log/guest-agent.log",
        "status: 1",
        "guest-agent: uninstalled (standalone)",
        "status: 0",
    ]
