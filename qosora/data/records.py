"""Training and evaluation data: files or hub data sets, read and checked row by row.

JSONL, JSON, CSV and Parquet files and hub data sets become `Records` of one of three kinds, with TRL's column names:

    prompt-completion   {"prompt": text or messages, "completion": text or messages}
    messages            {"messages": [{"role": ..., "content": ...}, ...]}
    text                {"text": ...}

What is wrong is told in one line that names the file and its line or row. Files are held in memory, as text.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from qosora.data.chat import refuse_broken_text
from qosora.errors import DataError, first_line

__all__ = ["Columns", "Records", "load_records", "no_progress_bars"]

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")

Row = tuple[str, dict[str, Any]]  # where it is ("line 3"), and its values by column


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the data, where they are not prompt and completion, messages, or text."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None

    def given(self) -> dict[str, str]:
        """Return the column of each part that was named."""
        return {part: name for part, name in vars(self).items() if name is not None}


@dataclass(frozen=True)
class Records:
    """Checked rows of one kind.

    Args:
        name: Of the file or data set, for messages.
        kind: "prompt-completion", "messages" or "text".
        rows: As in the module docstring; chats have their other columns, which a template may ask for, in "columns".
    """

    name: str
    kind: str
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)


def load_records(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
    limit: int | None = None,
) -> Records:
    """Read data and bring it into one of the three kinds.

    Args:
        source: A file (.jsonl, .json, .csv, .parquet), a hub data set (NAME or NAME:CONFIG), or rows.
        split: Of a hub data set; "train" by default.
        columns: Where the data is; found by the usual names by default.
        chat: Whether to turn prompt and completion into a chat of user and assistant.
        limit: Number of rows to read at most.

    Raises:
        DataError: Naming the file and its line or row.

    Example:
        >>> load_records([{"prompt": "1 + 1 =", "completion": " 2"}]).kind
        'prompt-completion'
    """
    name = str(source) if isinstance(source, (str, Path)) else "the data"
    rows = list(islice(_read(source, split), limit))
    if not rows:
        raise DataError(f"{name} is empty: it has no example")
    parts = _find_columns(name, rows, columns or Columns())
    normal = list(_normalised(name, rows, parts))
    if chat and "prompt" not in parts:
        raise DataError(f"{name}: chat wraps prompts and completions, but the data is {', '.join(parts)}")
    if chat:
        normal = [{"messages": _turns("user", r["prompt"]) + _turns("assistant", r["completion"])} for r in normal]
    kind = "messages" if chat else "prompt-completion" if "prompt" in parts else next(iter(parts))
    return Records(name, kind, normal)


def _turns(role: str, value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _find_columns(name: str, rows: Sequence[Row], columns: Columns) -> dict[str, str]:
    """Return the column of each part: prompt and completion, messages, or text."""
    there = list(rows[0][1])
    given = columns.given()
    for column in given.values():
        if column not in there:
            raise DataError(f"{name} has no column {column!r}; its columns are {', '.join(there)}")
    if given:
        return given
    for parts in (("prompt", "completion"), ("messages",), ("text",)):
        if all(part in there for part in parts):
            return {part: part for part in parts}
    raise DataError(
        f"{name} has none of the columns prompt and completion, messages, text; its columns are {', '.join(there)}. "
        "Say which to use with prompt_column and completion_column, messages_column, or text_column"
    )


def _normalised(name: str, rows: Iterable[Row], parts: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for where, row in rows:
        result = {}
        for part, column in parts.items():
            if column not in row:
                raise DataError(f"{name} {where}: no {column!r}, which other rows have")
            if problem := _problem(part, row[column]):
                raise DataError(f"{name} {where}: {column} {problem}")
            try:
                refuse_broken_text(row[column])
            except DataError as error:
                raise DataError(f"{name} {where}: {column} {error}") from None
            result[part] = row[column]
        if len({type(value) for value in result.values()}) > 1:
            raise DataError(f"{name} {where}: prompt and completion must both be text or both be messages")
        if isinstance(next(iter(result.values())), list) and (others := row.keys() - set(parts.values())):
            result["columns"] = {column: row[column] for column in row if column in others}
        yield result


def _problem(part: str, value: Any) -> str | None:
    """Return what is wrong with a value, or None."""
    if value is None:
        return "is null; it must be text"
    if isinstance(value, str) and part != "messages":
        return None if value.strip() else "is empty"
    if part == "text" or not isinstance(value, list):
        return f"is {_kind_of(value)}; it must be {'a list of messages' if part == 'messages' else 'text'}"
    if not value:
        return "is an empty list of messages"
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'has no role in message {i}; a message is {{"role": ..., "content": ...}}'
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"has no text as content in message {i} ({message['role']})"
    return None


def _kind_of(value: Any) -> str:
    return {
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }.get(type(value), f"of type {type(value).__name__}")


def _read(source: str | Path | Iterable[Mapping[str, Any]], split: str | None) -> Iterator[Row]:
    if not isinstance(source, (str, Path)):
        return _numbered(source)
    path = Path(source).expanduser()
    if not path.exists() and not _looks_like_a_file(str(source), path):
        return _numbered(_hub_rows(str(source), split or "train"))
    if not path.exists():
        raise DataError(f"{source}: no such file")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.is_dir() or path.suffix.lower() not in readers:
        kind = "a folder" if path.is_dir() else f"a file of unknown kind {path.suffix!r}"
        raise DataError(f"{source} is {kind}; name a file that ends in {', '.join(EXTENSIONS)}")
    if split is not None:
        raise DataError(f"{source} is a file, and split {split!r} is for hub data sets; leave it out")
    return _opened(path, readers[path.suffix.lower()])


def _looks_like_a_file(source: str, path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS or source.startswith(("/", ".", "~")) or source.count("/") > 1


def _opened(path: Path, reader: Any) -> Iterator[Row]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        if _first_character(file) == "[":  # a list, under the name of the other kind
            yield from _listed_rows(path)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                row = _parsed(f"{path} line {number}", line.rstrip("\r\n"))
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number}: expected a JSON object, got {_kind_of(row)}")
                yield f"line {number}", row


def _first_character(file: TextIO) -> str:
    """Return the first character of a file that is no white space, and go back to its beginning."""
    first = next((line.strip()[0] for line in file if line.strip()), "")
    file.seek(0)
    return first


def _json_rows(path: Path) -> Iterator[Row]:
    """Read a list, or JSON lines, as data sets are often shipped under this name."""
    with path.open(encoding="utf-8-sig") as file:
        lines = list(islice(filter(str.strip, file), 2))
    if len(lines) == 2 and all(_is_object(line) for line in lines):
        return _jsonl_rows(path)
    return _listed_rows(path)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _listed_rows(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    value = _parsed(str(path), text) if text.strip() else []
    if isinstance(value, dict):  # {"data": [...]}, or the only row
        value = (
            next(iter(value.values())) if len(value) == 1 and isinstance(next(iter(value.values())), list) else [value]
        )
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of objects, got {_kind_of(value)}")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number}: expected a JSON object, got {_kind_of(row)}")
        yield f"row {number}", row


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: broken JSON ({error.msg} at {at})") from None
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply)") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: broken JSON ({first_line(error)})") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's limit is 128 KiB for a field
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(f"{path} line {reader.line_num}: not the {wanted} fields that the header names")
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path} line {reader.reader.line_num}: broken CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from None


def _hub_rows(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    with no_progress_bars():
        try:
            rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # whatever the hub, a proxy or a loading script raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{source}: no such file, and no hub data set that can be loaded ({reason})") from error
    return rows


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
