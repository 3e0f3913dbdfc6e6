"""How the runtime handles its command line: archives, source files, and damaged ones."""

from __future__ import annotations

import io
import random
import subprocess
import zipfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.conftest import RunRuntime

MAIN = "import sys\nfrom package import part\nprint(part.NAME, sys.argv[1:], __name__)\n"
PART = "NAME = 'part'  # " + "long and compressible " * 40 + "\n"


def pack(*, method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"", main: str = MAIN) -> bytes:
    """Make a zip archive with a main program that imports from a package."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr("package/part.py", PART)
        archive.writestr("__main__.py", main)
        archive.comment = comment
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\nexec nothing PK\x05\x06\n" * 3])
@pytest.mark.parametrize("comment", [b"", b"c" * 65535])
def test_an_archive_is_run(
    method: int, before: bytes, comment: bytes, run_runtime: RunRuntime, tmp_path: Path
) -> None:
    """Archives are found stored or deflated, after other bytes, and with the longest comment."""
    path = tmp_path / "program"
    path.write_bytes(before + pack(method=method, comment=comment))
    done = run_runtime(path, "a", "-b")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "part ['a', '-b'] __main__\n"


def test_an_archive_behind_the_interpreter_is_run(runtime: Path, tmp_path: Path) -> None:
    """A runtime with an archive appended is a program: it gets all arguments and knows its path."""
    path = tmp_path / "program"
    main = "import sys\nfrom package import part\nprint(part.NAME, sys.argv)\n"
    path.write_bytes(runtime.read_bytes() + pack(main=main))
    path.chmod(0o755)
    words = ["-c", "x", "--help"]
    done = subprocess.run(
        ["another name", *words], executable=path, capture_output=True, check=True, text=True
    )
    assert done.stdout == f"part {[str(path), *words]}\n"


def test_an_archive_is_found_from_where_it_is_run(run_runtime: RunRuntime, tmp_path: Path) -> None:
    """A relative path works as well as an absolute one."""
    (tmp_path / "program").write_bytes(pack())
    assert run_runtime("program", cwd=tmp_path).stdout == "part [] __main__\n"


def test_damage_never_runs(run_runtime: RunRuntime, tmp_path: Path) -> None:
    """If any byte of a member is changed, its code does not run and the status is not 0."""
    whole = pack(main="raise SystemExit(0)\n" + "# as it should be\n" * 20)
    path = tmp_path / "program"
    path.write_bytes(whole)
    assert run_runtime(path).returncode == 0
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        member = archive.getinfo("__main__.py")
    start = member.header_offset + 30 + len("__main__.py")
    places = random.Random(1).sample(range(start, start + member.compress_size), 12)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        done = run_runtime(path)
        assert done.returncode == 1, place
        assert "damaged" in done.stderr


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_an_error(
    keep: float, run_runtime: RunRuntime, tmp_path: Path
) -> None:
    """A truncated archive is neither run as an archive nor as source."""
    whole = pack()
    path = tmp_path / "program"
    path.write_bytes(whole[: int(len(whole) * keep)])
    done = run_runtime(path)
    assert done.returncode == 1
    assert "Error" in done.stderr


def test_source_is_run(run_runtime: RunRuntime, tmp_path: Path) -> None:
    """A source file is run as the main program, and can import modules beside it."""
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nprint(beside.NAME, __file__, sys.argv[1:])\n")
    assert run_runtime(script, "x").stdout == f"beside {script} ['x']\n"
    assert run_runtime("-c", "import sys; print(sys.argv)", "x").stdout == "['-c', 'x']\n"


def test_nothing_outside_the_archive_is_imported(run_runtime: RunRuntime, tmp_path: Path) -> None:
    """No modules come from the working directory, the archive's folder or the environment."""
    (tmp_path / "foreign.py").write_text("print('foreign code ran')\n")
    (tmp_path / "os.py").write_text("print('foreign code ran')\n")
    path = tmp_path / "program"
    path.write_bytes(pack(main="import os, foreign\n"))
    environment = {"MICROPYPATH": str(tmp_path), "HOME": str(tmp_path), "MICROPYINSPECT": "1"}
    done = run_runtime(path, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert "no module named 'foreign'" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("import sys; sys.exit(256 + 3)", 3, ""),
    ],
)
def test_exit_statuses_are_as_in_cpython(
    code: str, status: int, stderr: str, run_runtime: RunRuntime
) -> None:
    """SystemExit sets the exit status."""
    done = run_runtime("-c", code)
    assert (done.returncode, done.stderr) == (status, stderr)


def test_an_exception_is_told(run_runtime: RunRuntime) -> None:
    """An uncaught exception is printed, and the status is 1."""
    done = run_runtime("-c", "raise ValueError('odd')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: odd\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-x"],
        ["-c"],
        ["-X"],
        ["-X", "heapsize=1k", "p"],
        ["-X", "heapsize=9999999999999m", "p"],
    ],
)
def test_wrong_command_lines_are_refused(words: list[str], run_runtime: RunRuntime) -> None:
    """Wrong usage gives status 2 and a line of usage."""
    done = run_runtime(*words)
    assert done.returncode == 2
    assert "heapsize=BYTES[k|m]" in done.stderr


def test_a_missing_file_is_an_error(run_runtime: RunRuntime, tmp_path: Path) -> None:
    """A missing file gives status 1 and an error that names the cause."""
    done = run_runtime(tmp_path / "none")
    assert done.returncode == 1
    assert "ENOENT" in done.stderr


@pytest.mark.parametrize(("heap", "answer"), [("128k", "no"), ("1m", "yes")])
def test_the_heap_has_the_size_that_was_asked_for(
    heap: str, answer: str, run_runtime: RunRuntime
) -> None:
    """Allocating beyond the heap limit raises MemoryError, which can be caught."""
    code = "try:\n  b = bytearray(400000)\n  print('yes')\nexcept MemoryError:\n  print('no')\n"
    assert run_runtime("-X", f"heapsize={heap}", "-c", code).stdout == f"{answer}\n"
