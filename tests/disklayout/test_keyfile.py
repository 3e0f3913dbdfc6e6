"""Key files: how a selector is read, which volume it fits, what a file may stand for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from vmprovision.disklayout.keyfile import (
    SIZE_LIMIT,
    Key,
    KeyFile,
    parse_selector,
    read_keys,
)
from vmprovision.errors import PlanError

UUID = "0f0e0d0c-0b0a-4908-8706-050403020100"


@pytest.mark.parametrize(
    ("selector", "volume", "path"),
    [
        ("/dev/sda2:file:key", "/dev/sda2", "key"),
        ("all:file:/etc/key", "all", "/etc/key"),
        (f"{UUID}:file:a:b", UUID, "a:b"),
    ],
)
def test_a_selector_names_a_volume_and_a_file(selector: str, volume: str, path: str) -> None:
    """The form is that of libguestfs's own tools; a path may hold colons."""
    assert parse_selector(selector) == KeyFile(path=Path(path), volume=volume)


@pytest.mark.parametrize(
    "selector", ["all:key:hunter2", "all:clevis", "hunter2", "file:hunter2", ":file:x", "all:file:"]
)
def test_a_wrong_selector_is_not_repeated(selector: str) -> None:
    """A possible key is in no message, and the hint shows the right form."""
    with pytest.raises(PlanError) as caught:
        parse_selector(selector)
    assert "hunter2" not in str(caught.value)
    assert "DEVICE:file:PATH" in caught.value.hint


@pytest.mark.parametrize(
    ("volume", "fits"),
    [
        ("all", True),
        ("/dev/vg/root", True),
        ("/dev/mapper/vg-root", True),
        (UUID.upper(), True),
        (f"UUID={UUID}", True),
        ("/dev/vg/other", False),
    ],
)
def test_a_key_fits_by_device_or_uuid(volume: str, fits: bool) -> None:  # noqa: FBT001 -- a parameter
    """A volume has several names, and each of them will do."""
    key = Key(file=KeyFile(path=Path("k"), volume=volume), content=b"x")
    assert key.fits("/dev/vg/root", UUID, "/dev/mapper/vg-root") is fits


@pytest.mark.parametrize(
    ("content", "readings"),
    [
        (b"secret", [b"secret"]),
        (b"secret\n", [b"secret", b"secret\n"]),
        (b"one\ntwo\n", [b"one\ntwo\n", b"one"]),
        (b"\0\n\xff", [b"\0\n\xff", b"\0"]),
        (b"\n", [b"\n"]),
    ],
)
def test_a_key_file_is_read_as_both_tools_read_it(content: bytes, readings: list[bytes]) -> None:
    """Cryptsetup takes the whole file, libguestfs's tools its first line."""
    assert Key(file=KeyFile(path=Path("k")), content=content).passphrases() == readings


def test_a_key_is_not_shown() -> None:
    """A key that is printed, as in a log, shows its file only."""
    assert "hunter2" not in repr(Key(file=KeyFile(path=Path("k")), content=b"hunter2"))


def test_what_is_no_key_file_is_refused(tmp_path: Path) -> None:
    """Nothing there, a pipe without a writer, a directory, nothing in it or too much."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", SIZE_LIMIT + 1)
    for name in ("missing", "pipe", "empty", "large", "."):
        with pytest.raises(PlanError, match="the key file"):
            read_keys((KeyFile(path=tmp_path / name),))


def test_an_open_key_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that others can read is used, and the user is told how to close it."""
    path = tmp_path / "key"
    path.write_bytes(b"hunter2")
    for mode, said in ((0o600, False), (0o640, True)):
        path.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            (key,) = read_keys((KeyFile(path=path),))
        assert key.content == b"hunter2"
        assert ("chmod 600" in caplog.text) is said
        assert "hunter2" not in caplog.text
