"""Errors know the image that they are about, and name it once."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

import vmprovision
from vmprovision.errors import ImageNotFoundError, NoOperatingSystemError, VmprovisionError

if TYPE_CHECKING:
    from pathlib import Path


def test_an_image_whose_name_is_a_word_of_the_message_is_named(tmp_path: Path) -> None:
    """The name is put in front of the message whatever words the message has."""
    guest = tmp_path / "directory"
    guest.mkdir()
    with pytest.raises(NoOperatingSystemError) as caught:
        vmprovision.inspect(guest)
    error = caught.value
    assert "directory" in error.sentence
    assert error.image == guest
    assert error.message == f"{guest}: {error.sentence}"
    assert error.as_json()["image"] == str(guest)
    assert error.as_json()["message"] == error.message


def test_an_error_that_names_its_file_is_not_named_twice(tmp_path: Path) -> None:
    """An ``ImageError`` names the file itself; its ``image`` is the one that was worked on."""
    image = tmp_path / "gone.qcow2"
    with pytest.raises(ImageNotFoundError) as caught:
        vmprovision.inspect(image)
    assert caught.value.image == image
    assert caught.value.message.count(str(image)) == 1


def test_an_error_from_another_process_keeps_its_image(tmp_path: Path) -> None:
    """A fleet's worker sends its errors home by pickle."""
    error = VmprovisionError("broken", hint="repair it")
    error.image = tmp_path / "a.img"
    came = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert (came.image, str(came)) == (error.image, str(error))
