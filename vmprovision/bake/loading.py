"""Read a bake file, and report every fault in it with its line."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from vmprovision.bake.positions import key_lines, nearest_line
from vmprovision.bake.schema import BakeFile
from vmprovision.errors import BakeFileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from vmprovision.bake.positions import KeyPath

SIZE_LIMIT = 64 << 10
LINE_LIMIT = 2000
HINT = "docs/bake.md explains every key"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBakeFile:
    """A valid bake file.

    Attributes:
        path: the file.
        content: its bytes.
        bake: its parsed content.
        lines: the line of each key.
    """

    path: Path
    content: bytes
    bake: BakeFile
    lines: Mapping[KeyPath, int]

    @property
    def name(self) -> str:
        """The name of the output folder and of the images in it."""
        return self.path.stem

    def line_of(self, *path: str | int) -> int:
        """Return the line of a key, or of the table that it belongs to."""
        return nearest_line(self.lines, path)

    def beside(self, name: str) -> Path:
        """Return the path of a file that is named relative to the bake file."""
        return self.path.absolute().parent / name


def load_bake_file(path: Path) -> LoadedBakeFile:
    """Parse and check a bake file.

    Raises:
        BakeFileError: it cannot be read or is not valid; the message names the file, the
            first faulty line and the nearest known key, and ``problems`` has every fault.
    """
    content, text = _read(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _error(path, [(_line_of_syntax(text, str(exc)), f"not valid TOML: {exc}")]) from exc
    lines = key_lines(text)
    try:
        bake = BakeFile.model_validate(document)
    except ValidationError as exc:
        problems = [_problem(each, lines) for each in exc.errors(include_url=False)]
        raise _error(path, sorted(problems)) from exc
    loaded = LoadedBakeFile(path=path, content=content, bake=bake, lines=lines)
    _refuse_equal_names(loaded)
    return loaded


def _read(path: Path) -> tuple[bytes, str]:
    try:
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
        text = content.decode("utf-8").replace("\r\n", "\n")
    except OSError as exc:
        raise BakeFileError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        line = content[: exc.start].count(b"\n") + 1
        raise _error(path, [(line, "not valid UTF-8")]) from exc
    if len(content) > SIZE_LIMIT or text.count("\n") > LINE_LIMIT:
        raise BakeFileError(
            f"{path} is larger than a bake file may be: {SIZE_LIMIT} bytes, {LINE_LIMIT} lines"
        )
    return content, text


def _error(path: Path, problems: Sequence[tuple[int, str]]) -> BakeFileError:
    (line, fault), more = problems[0], len(problems) - 1
    rest = f" (and {more} more)" if more else ""
    return BakeFileError(f"{path}:{line}: {fault}{rest}", problems=problems, hint=HINT)


def _line_of_syntax(text: str, message: str) -> int:
    """Return the line that the parser names, or the last line if the file ends too early."""
    match = re.search(r"at line (\d+)", message)
    return int(match[1]) if match else text.rstrip("\n").count("\n") + 1


def _problem(fault: ErrorDetails, lines: Mapping[KeyPath, int]) -> tuple[int, str]:
    """Return the line and the sentence of one fault that the model found."""
    path = fault["loc"]
    line = nearest_line(lines, path)
    where, key = _table_name(path[:-1]), str(path[-1]) if path else ""
    if fault["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return line, f"unknown key {key!r} in {where}: {advice}"
    if fault["type"] == "missing":
        return line, f"{where} lacks {key!r}"
    subject = _table_name(path) if _is_table(path) else f"{key} in {where}"
    return line, f"{subject}: {_sentence(fault)}"


def _sentence(fault: ErrorDetails) -> str:
    message = fault["msg"].removeprefix("Input ")
    if fault["type"].endswith("_type") or fault["type"] == "literal_error":
        return f"{message[0].lower()}{message[1:]}, not {fault['input']!r:.60}"
    return message if fault["type"] == "bake" else f"{message[0].lower()}{message[1:]}"


def _table_name(path: KeyPath) -> str:
    """Return a table's name as it is written in the file."""
    names = [str(part) for part in path if isinstance(part, str)]
    if not names:
        return "the bake file"
    name = ".".join(names)
    return f"[[{name}]]" if name == "output" else f"[{name}]"


def _is_table(path: KeyPath) -> bool:
    return bool(_keys_at(path)) or path == ("output",)


def _keys_at(path: KeyPath) -> list[str]:
    """Return the keys of the model for the table at this path."""
    model: Any = BakeFile
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field else None
        if model is None:
            return []
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 -- of any field
    """Return the model of a field's value, even if optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _model_in(inner):
            return found
    return None


def _refuse_equal_names(loaded: LoadedBakeFile) -> None:
    """Refuse two outputs that would be the same file."""
    seen: dict[str, int] = {}
    for number, output in enumerate(loaded.bake.output):
        name = output.file_name(loaded.name)
        line = loaded.line_of("output", number)
        if name in seen:
            raise _error(
                loaded.path,
                [(line, f"[[output]]: the output at line {seen[name]} has the name {name!r} too")],
            )
        seen[name] = line
