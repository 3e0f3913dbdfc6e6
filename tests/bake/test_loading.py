"""Bake files: what is refused, with line and nearest key, and the schema for editors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import pytest

from vmprovision.bake import load_bake_file
from vmprovision.bake.positions import key_lines
from vmprovision.bake.schema import (
    RESERVED,
    BakeFile,
    Output,
    OutputFormat,
    json_schema,
    schema_text,
)
from vmprovision.errors import BakeFileError
from vmprovision.image.header import FORMATS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHA = "0" * 64
SOURCE = f'[source]\nimage = "a.qcow2"\nsha256 = "{SHA}"\n'
OUTPUT = '[[output]]\nformat = "qcow2"\n'


def load(folder: Path, text: str) -> BakeFile:
    """Return the parsed bake file of this text."""
    path = folder / "golden.toml"
    path.write_text(text)
    return load_bake_file(path).bake


def problems_of(folder: Path, text: str) -> list[tuple[int, str]]:
    """The faults that are reported of a bake file."""
    with pytest.raises(BakeFileError) as caught:
        load(folder, text)
    assert caught.value.message.startswith(f"{folder}/golden.toml:{caught.value.problems[0][0]}: ")
    return list(caught.value.problems)


def test_a_bake_file_is_read(tmp_path: Path) -> None:
    """Every key of the documentation's example arrives in the model."""
    text = (
        SOURCE
        + '[agent]\nmanager_url = "http://192.0.2.1:3000"\nport = 9000\n'
        + "[prove]\ntimeout = 30\n"
        + OUTPUT
        + 'compress = true\n[[output]]\nformat = "oci"\nname = "disk"\n'
    )
    bake = load(tmp_path, text)
    assert bake.source.sha256 == SHA
    assert (bake.agent.manager_url, bake.agent.port) == ("http://192.0.2.1:3000", 9000)
    assert bake.prove is not None
    assert bake.prove.timeout == 30
    assert [output.file_name("golden") for output in bake.output] == ["golden.qcow2", "disk"]
    assert bake.output[0].compress


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("sha256 = 1 2", 1, "not valid TOML"),
        (SOURCE.replace("sha256", "sha265") + OUTPUT, 3, "unknown key 'sha265' in [source]: did"),
        (SOURCE + OUTPUT + '# a note\n\nformt = "raw"\n', 8, "did you mean 'format'?"),
        (SOURCE + "[agnet]\n" + OUTPUT, 4, "unknown key 'agnet' in the bake file: did you mean"),
        (SOURCE + "[agent]\nvm_id = 'a'\n" + OUTPUT, 5, "unknown key 'vm_id' in [agent]"),
        (SOURCE + OUTPUT + "compress = 1\n", 6, "should be a valid boolean, not 1"),
        (SOURCE + '[[output]]\nformat = "qcow"\n', 5, "'qcow2'"),
        (SOURCE, 1, "lacks 'output'"),
        ("output = []\n" + SOURCE, 1, "at least 1 item"),
        (OUTPUT, 1, "the bake file lacks 'source'"),
        ('[source]\nimage = "a"\n' + OUTPUT, 1, "[source]: needs sha256"),
        ("[source]\n" + OUTPUT, 1, "[source]: needs an image, a url or a recipe"),
        (f'[source]\nrecipe = "a"\nsha256 = "{SHA}"\n' + OUTPUT, 1, "a recipe is built here"),
        (f'[source]\nurl = "http://a/b"\nsha256 = "{SHA}"\n' + OUTPUT, 2, "https:// or file://"),
        (
            f'[source]\nurl = "https://u:p@a/b"\nsha256 = "{SHA}"\n' + OUTPUT,
            2,
            "must not contain a password",
        ),
        (SOURCE + 'signature = "a.asc"\n' + OUTPUT, 1, "signature and keyring belong together"),
        (SOURCE + '[agent]\nmanager_url = "ftp://a"\n' + OUTPUT, 5, "is not valid"),
        (SOURCE + "[agent]\nport = 70000\n" + OUTPUT, 5, "70000 is not a TCP port"),
        (SOURCE + "[prove]\ntimeout = -1\n" + OUTPUT, 5, "greater than 0"),
        (SOURCE + '[[output]]\nformat = "raw"\ncompress = true\n', 4, "raw has no compression"),
        (SOURCE + OUTPUT + 'name = "../a"\n', 6, "should match pattern"),
        (SOURCE + OUTPUT + 'name = "SHA256SUMS"\n', 4, "bake itself writes"),
        (SOURCE + OUTPUT + OUTPUT, 6, "the output at line 4 has the name 'golden.qcow2' too"),
        (SOURCE + "[agent]\nlisten = '''\n\n,'''\nprot = 1\n" + OUTPUT, 5, "cannot listen on"),
    ],
)
def test_faults_have_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    """The message names the file, the line and what is known instead."""
    found = problems_of(tmp_path, text)
    assert found[0][0] == line, found
    assert words in found[0][1]


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    """All faults of a file are reported at once."""
    text = SOURCE.replace("image", "imgae") + "[agent]\nprot = 1\n" + OUTPUT + "compres = true\n"
    assert [line for line, _ in problems_of(tmp_path, text)] == [2, 5, 8]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """A file that is missing, binary or far too large is one clear error."""
    path = tmp_path / "a.toml"
    with pytest.raises(BakeFileError, match="cannot be read: No such file"):
        load_bake_file(path)
    path.write_bytes(b"[source]\n\xff")
    with pytest.raises(BakeFileError, match=r"a\.toml:2: not valid UTF-8"):
        load_bake_file(path)
    path.write_text("#\n" * 40_000)
    with pytest.raises(BakeFileError, match="larger than a bake file may be"):
        load_bake_file(path)


def test_lines_of_keys() -> None:
    """Values of several lines, inline tables, comments and dotted keys have their first line."""
    text = '# c\n\na = """\nx = 1\n"""\nb.c = [\n 1,\n 2,\n]\n[t]\nd = { e = 1 }\n[[u]]\n[[u]]\nf=2'
    lines = key_lines(text)
    assert lines["a",] == 3
    assert lines["b", "c"] == 6
    assert lines["b", "c", 1] == 6
    assert (lines["t",], lines["t", "d", "e"]) == (10, 11)
    assert (lines["u", 0], lines["u", 1], lines["u", 1, "f"]) == (12, 13, 14)


def test_the_published_schema_is_that_of_the_model() -> None:
    """docs/bake.schema.json is what `vmprovision bake --schema` prints."""
    published = Path(__file__).parents[2] / "docs" / "bake.schema.json"
    assert published.read_text() == schema_text(), "vmprovision bake --schema > that file"


def test_the_schema_agrees_with_the_model(tmp_path: Path) -> None:
    """An editor accepts what the model accepts, and marks an unknown key."""
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = SOURCE + OUTPUT
    load(tmp_path, good)
    jsonschema.validate(tomllib.loads(good), schema)
    for bad in (good + "compres = true\n", good + 'name = "a/b"\n', SOURCE):
        problems_of(tmp_path, bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tomllib.loads(bad), schema)
    assert json.loads(schema_text()) == schema


def test_the_formats_are_those_of_the_image_room(tmp_path: Path) -> None:
    """A source can state every format that images have, and no other."""
    for name in FORMATS:
        assert load(tmp_path, SOURCE + f'format = "{name}"\n' + OUTPUT).source.format == name
    problems_of(tmp_path, SOURCE + 'format = "qed"\n' + OUTPUT)
    assert all(
        Output(format=name).file_name("a") not in RESERVED for name in get_args(OutputFormat)
    )
