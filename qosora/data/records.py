"""Training and evaluation data: files or hub data sets, read and checked row by row.

JSONL, JSON, CSV and Parquet files and hub data sets become `Records` of one kind, with TRL's column names, where a turn
is text or messages:

    prompt-completion   {"prompt": turn, "completion": turn}
    messages            {"messages": [{"role": ..., "content": ...}, ...]}
    text                {"text": ...}
    preference          {"prompt": turn, "chosen": turn, "rejected": turn}; the prompt may be at the beginning of both
    labeled             {"prompt": turn, "completion": turn, "label": good or not}, or made of preferences
    prompts             {"prompt": turn}, and whatever a reward asks for
    classes             {"text": ..., "label": class}; two texts as text and text_pair
    tags                {"tokens": [word, ...], "tags": [class, ...]}

A row of the first two kinds may have images, a list of them in a column images, or one in a column image; a message's
content is then text, or a list of {"type": "image"} and {"type": "text", "text": ...}.

What is wrong is told in one line that names the file and its line or row. Files are held in memory, as text.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from qosora.data.chat import refuse_broken_text
from qosora.errors import DataError, first_line

__all__ = ["Columns", "Records", "load_records", "no_progress_bars", "split_to_measure"]

logger = logging.getLogger("qosora")

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")

_PREFERENCES = {("prompt", "chosen", "rejected"): "preference", ("chosen", "rejected"): "preference"}
#: By what is asked for: the columns that are looked for, in this order, and the kind that they make.
FORMS: dict[str, dict[tuple[str, ...], str]] = {
    "language": {("prompt", "completion"): "prompt-completion", ("messages",): "messages", ("text",): "text"},
    "preference": _PREFERENCES,
    "labeled": {("prompt", "completion", "label"): "labeled", **_PREFERENCES},
    "prompts": {("prompt",): "prompts"},
    "classes": {("text", "text_pair", "label"): "classes", ("text", "label"): "classes"},
    "tags": {("tokens", "tags"): "tags"},
}
_SAY = {
    "language": "Say which to use with prompt_column and completion_column, messages_column, or text_column",
    "preference": "Say which the prompt is with prompt_column, and call the others like this",
    "labeled": "Say which to use with prompt_column and completion_column, and call the others like this",
    "prompts": "Say which to use with prompt_column",
    "classes": "Say which to use with text_column and label_column",
    "tags": "Say which to use with text_column and label_column",
}
_IMAGES = ("images", "image")
_LABELS = {"true": True, "1": True, "false": False, "0": False}

Row = tuple[str, dict[str, Any]]  # where it is ("line 3"), and its values by column


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the data, where they are not prompt and completion, messages, or text."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    label: str | None = None

    def given(self, form: str) -> dict[str, str]:
        """Return the column of each part that was named: the words of a tagged text are its text."""
        called = {"text": "tokens", "label": "tags"} if form == "tags" else {}
        return {called.get(part, part): name for part, name in vars(self).items() if name is not None}


@dataclass(frozen=True)
class Records:
    """Checked rows of one kind.

    Args:
        name: Of the file or data set, for messages.
        kind: As in the module docstring.
        rows: As there; chats have their other columns, which a template may ask for, in "columns", and prompts theirs.
        folder: Where paths of images begin.
    """

    name: str
    kind: str
    rows: list[dict[str, Any]]
    folder: Path = Path()

    @property
    def seen(self) -> bool:
        """Whether there are images."""
        return any(row.get("images") for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def load_records(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    form: str = "language",
    split: str | None = None,
    columns: Columns | None = None,
    chat: bool = False,
    limit: int | None = None,
) -> Records:
    """Read data and bring it into one kind.

    Args:
        source: A file (.jsonl, .json, .csv, .parquet), a hub data set (NAME or NAME:CONFIG), or rows.
        form: "language" for the first three kinds, or the name of one of the others.
        split: Of a hub data set; "train" by default.
        columns: Where the data is; found by the usual names by default.
        chat: Whether to turn prompts into turns of a user, and what answers them into turns of the assistant.
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
    parts, kind = _find_columns(name, rows, columns or Columns(), form)
    if kind in ("classes", "tags"):
        return Records(name, kind, list(_with_classes(name, rows, parts)))
    normal = list(_normalised(name, rows, parts, kind))
    if chat and "prompt" not in parts:
        raise DataError(f"{name}: chat wraps prompts and completions, but the data is {', '.join(parts)}")
    if kind == "preference":
        normal = _told_apart(name, normal)
    if chat:
        normal = [{part: _turns(part, value) for part, value in row.items()} for row in normal]
    if chat and kind == "prompt-completion":
        kind, normal = "messages", [_as_chat(row) for row in normal]
    if form == "labeled" and kind == "preference":  # all that are good, then all that are not, as TRL does
        kind = "labeled"
        normal = [
            {**row, "completion": row[part], "label": part == "chosen"}
            for part in ("chosen", "rejected")
            for row in normal
        ]
    folder = Path(name).expanduser().parent if isinstance(source, (str, Path)) else Path()
    return Records(name, kind, normal, folder)


def _as_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    others = {part: value for part, value in row.items() if part not in ("prompt", "completion")}
    return {"messages": row["prompt"] + row["completion"], **others}


def split_to_measure(source: Any, split: str | None) -> str | None:
    """Return which split of some data to measure: of a hub data set "test" by default, of a file or rows none."""
    return split or ("test" if isinstance(source, str) and not Path(source).expanduser().exists() else None)


def _turns(part: str, value: Any) -> Any:
    role = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}.get(part)
    return [{"role": role, "content": value}] if role and isinstance(value, str) else value


def _told_apart(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return preferences with a prompt each, without those that prefer nothing."""
    from trl import extract_prompt  # as TRL's trainers find it

    apart = []
    for number, row in enumerate(rows, 1):
        if row["chosen"] == row["rejected"]:
            continue
        whole = row if "prompt" in row else {**row, **extract_prompt(row)}
        if empty := [part for part in ("prompt", "chosen", "rejected") if not whole[part]]:
            raise DataError(
                f"{name} example {number}: the prompt is what chosen and rejected begin with, which leaves {empty[0]} "
                "empty; give a column prompt"
            )
        apart.append(whole)
    if not apart:
        raise DataError(f"{name}: chosen and rejected are the same in all {len(rows)} examples")
    if len(apart) < len(rows):
        same = len(rows) - len(apart)
        logger.warning(
            "%s: %d of %d examples are left out, as chosen and rejected are the same in them", name, same, len(rows)
        )
    return apart


def _find_columns(name: str, rows: Sequence[Row], columns: Columns, form: str) -> tuple[dict[str, str], str]:
    """Return the column of each part, such as prompt and completion, and the kind of the data."""
    there = list(rows[0][1])
    given = columns.given(form)
    for column in given.values():
        if column not in there:
            raise DataError(f"{name} has no column {column!r}; its columns are {', '.join(there)}")
    for parts, kind in FORMS[form].items():
        wanted = {part: given.get(part, part) for part in parts}
        if given.keys() <= wanted.keys() and all(column in there for column in wanted.values()):
            return wanted, kind
    known = ", ".join(_listed(parts) for parts in FORMS[form])
    say = _SAY[form]
    if form == "language" and {"chosen", "rejected"} <= set(there):
        say = "Learn from chosen and rejected with method dpo, orpo or kto"
    raise DataError(f"{name} has none of the columns {known}; its columns are {', '.join(there)}. {say}")


def _listed(parts: Sequence[str]) -> str:
    """Return names in words."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _normalised(name: str, rows: Iterable[Row], parts: Mapping[str, str], kind: str) -> Iterator[dict[str, Any]]:
    """Give rows by part; what else they have is kept for chats, and of prompts."""
    for where, row in rows:
        result: dict[str, Any] = {}
        images = None if kind == "text" else _images(row)
        for part, column in parts.items():
            value = _value(name, where, row, column)
            if part == "label":
                value = value if isinstance(value, bool) else _LABELS.get(str(value).strip().lower())
                if value is None:
                    raise DataError(f"{name} {where}: {column} is {row[column]!r}; it must be true or false")
            elif problem := _problem(part, value, with_images=images is not None):
                raise DataError(f"{name} {where}: {column} {problem}")
            _require_whole(name, where, column, value)
            result[part] = value
        turns = [part for part in parts if part != "label"]
        if len({type(result[part]) for part in turns}) > 1:
            all_of = "both" if len(turns) == 2 else "all"
            raise DataError(f"{name} {where}: {_listed(turns)} must {all_of} be text or {all_of} be messages")
        if images is not None:
            result["images"] = images
        others = row.keys() - set(parts.values()) - set(_IMAGES)
        if others and (kind == "prompts" or isinstance(result[turns[0]], list)):
            result["columns"] = {column: row[column] for column in row if column in others}
        yield result


def _with_classes(name: str, rows: Iterable[Row], parts: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Give rows of texts or words with classes by part."""
    for where, row in rows:
        result = {}
        for part, column in parts.items():
            value = _value(name, where, row, column)
            if problem := _problem_of_class(part, value):
                raise DataError(f"{name} {where}: {column} {problem}")
            _require_whole(name, where, column, value)
            result[part] = value
        yield result


def _value(name: str, where: str, row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(f"{name} {where}: no {column!r}, which other rows have")
    return row[column]


def _require_whole(name: str, where: str, column: str, value: Any) -> None:
    try:
        refuse_broken_text(value)
    except DataError as error:
        raise DataError(f"{name} {where}: {column} {error}") from None


def _images(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the images of a row; None without a column of them."""
    column = next((name for name in _IMAGES if name in row), None)
    if column is None:
        return None
    found = row[column]
    return found if isinstance(found, list) else [] if found is None else [found]


def _problem(part: str, value: Any, *, with_images: bool = False) -> str | None:
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
        content = message.get("content")
        if with_images and isinstance(content, list) and content and all(map(_is_part, content)):
            continue
        if not isinstance(content, str) and not message.get("tool_calls"):
            return f"has no text as content in message {i} ({message['role']})"
    return None


def _is_part(part: Any) -> bool:
    """Say whether a part of a message's content is text, or the place of an image."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def _problem_of_class(part: str, value: Any) -> str | None:
    """Return what is wrong with a text or a class, or a list of words or classes, or None."""
    if part in ("label", "tags"):
        labels = [value] if part == "label" else value if isinstance(value, list) else []
        if labels and all(isinstance(one, (str, int)) and one != "" for one in labels):
            return None
        return f"is {value!r}; it must be the name or number of a class" + " for each word" * (part == "tags")
    if part != "tokens":
        return _problem("text", value)
    words = value if isinstance(value, list) else []
    return None if words and all(isinstance(word, str) and word for word in words) else "must be a list of words"


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
