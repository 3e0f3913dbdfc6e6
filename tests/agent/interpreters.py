"""Finds the interpreters the agent is tested on, and fetches MicroPython where there is none.

MicroPython comes from PATH, or from Debian (its package exists from trixie
on): apt downloads the package and its libraries into a cache with a private
root, using the host's own mirror and keyring, and the program runs under its
own loader. Nothing is installed and the host's apt sources stay as they are.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE_SUITE = "trixie"
MICROPYTHON = "micropython"
TIME_LIMIT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A way to run Python source.

    Attributes:
        name: what the tests call it.
        argv: the program and the options the agent is run with.

    """

    name: str
    argv: tuple[str, ...]

    @property
    def is_micropython(self) -> bool:
        """Whether it reads source folders only: no zip files, no signals."""
        return self.name == MICROPYTHON


def cache_folder() -> Path:
    """Where downloads are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vmprovision" / "tests"


def find_cpythons() -> dict[str, Interpreter]:
    """The CPythons of this host by name: those of pyenv, and those on the usual paths."""
    found: dict[str, Interpreter] = {}
    seen: set[Path] = set()
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*"))
    places = [(folder.name, folder / "bin" / "python") for folder in pyenv]
    places += [(name, Path("/usr/bin") / name) for name in ("python2", "python3")]
    for name, path in places:
        if path.exists() and path.resolve() not in seen:
            seen.add(path.resolve())
            label = name if name.startswith("python") else f"cpython-{name}"
            found[label] = Interpreter(name=label, argv=(str(path), "-S", "-E", "-s"))
    return found


def interpreter_names() -> list[str]:
    """The names of all interpreters to test on; MicroPython is one even if it is not there yet."""
    return [*find_cpythons(), MICROPYTHON]


def one_of_each() -> list[str]:
    """One CPython and MicroPython, for tests that take seconds."""
    return [*list(find_cpythons())[-1:], MICROPYTHON]


def get_interpreter(name: str) -> Interpreter:
    """The interpreter of that name.

    Skips the test if MicroPython cannot be had; with CI set, fails it.
    """
    if name != MICROPYTHON:
        return find_cpythons()[name]
    try:
        argv = _find_micropython()
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"no MicroPython: {_explain(error)}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Interpreter(name=name, argv=(*argv, "-X", "heapsize=512k"))


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error}: {error.stderr.strip()[-400:]}"
    return str(error)


def _find_micropython() -> tuple[str, ...]:
    program = shutil.which("micropython")
    if program:
        return (program,)
    folder = cache_folder() / "micropython"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "micropython.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as workplace:
                _download(Path(workplace)).rename(folder)
    loader = next(iter(folder.glob("usr/lib*/**/ld-linux*.so*")))
    libraries = next(iter(folder.glob("usr/lib/*/libc.so.6"))).parent
    argv = (str(loader), "--library-path", str(libraries), str(folder / "usr/bin/micropython"))
    _run([*argv, "-c", "pass"])
    return argv


def _download(workplace: Path) -> Path:
    """A folder with MicroPython and every library it needs, unpacked."""
    uri, signed_by = _mirror()
    for folder in ("lists/partial", "archives/partial"):
        (workplace / folder).mkdir(parents=True)
    (workplace / "status").touch()
    signature = f"[signed-by={signed_by}] " if signed_by else ""
    (workplace / "sources.list").write_text(f"deb {signature}{uri} {PACKAGE_SUITE} main\n")
    options = {
        "Dir::Etc::sourcelist": workplace / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": workplace,
        # Nothing counts as installed, so every library comes along.
        "Dir::State::status": workplace / "status",
        "Dir::Cache": workplace,
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt, "update"])
    _run([*apt, "-y", "--download-only", "--no-install-recommends", "install", "micropython"])
    root = workplace / "root"
    for package in sorted((workplace / "archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])
    return root


def _mirror() -> tuple[str, str]:
    """The host's own Debian mirror and the keyring that signs it."""
    wanted = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(SIGNED_BY)|$(REPO_URI)"
    for line in _run(["apt-get", "indextargets", "--format", wanted]).splitlines():
        origin, label, component, signed_by, uri = line.split("|", 4)
        if (origin, label, component) == ("Debian", "Debian", "main"):
            keyring = signed_by if signed_by.startswith("/") else ""
            usual = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
            return uri, keyring or (str(usual) if usual.exists() else "")
    message = "this host has no Debian mirror in its apt sources"
    raise OSError(message)


def _run(argv: list[str]) -> str:
    return subprocess.run(
        argv,
        check=True,
        timeout=TIME_LIMIT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    ).stdout
