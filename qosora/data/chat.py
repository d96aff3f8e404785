"""Chats as text and as tokens, by the tokenizer's own template, and which part of the text is whose.

A template is somebody's program. It may render a turn otherwise when another follows, put a system prompt in front that
nobody wrote, refuse a chat, fail in any way, or never end. So where a turn begins and ends is found by rendering:

    begins    after what asks the model to write, as rendering the chat before it with a generation prompt ends;
    ends      where rendering the chat up to it ends;

and where the whole chat does not begin with either of these, because an earlier turn looks otherwise in it, by what
changes in the whole when the turn says something else, and what stands around that in the shorter chat.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from qosora.errors import DataError, first_line

__all__ = [
    "as_taken",
    "encode",
    "in_parts",
    "refuse_broken_text",
    "render",
    "template_options",
    "text_of",
    "turn_spans",
]

#: What a turn says to see where it stands. No template strips it, and no text is likely to begin or end as it does.
_MARK = "\u27e6turn\u27e7"
#: Keys of a message that say what it is, not what it says.
_STRUCTURE = {"role", "type", "id", "tool_call_id", "call_id"}
#: What transformers hands to a template by itself.
_OWN = {
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
}
#: A chat takes milliseconds.
_SECONDS = 20.0

Messages = Sequence[Mapping[str, Any]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    options: Mapping[str, Any] | None = None,
    *,
    generation: bool = False,
) -> str:
    """Return a chat as text.

    Args:
        tokenizer: With a chat template.
        messages: At least one.
        options: What else the template gets: `template_options` of a row.
        generation: Whether the model is to answer.

    Raises:
        DataError: Whatever goes wrong in the template.
    """
    return _rendered(tokenizer, as_taken(tokenizer, messages), options or {}, generation)


def as_taken(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[Mapping[str, Any]]:
    """Return messages as the template takes them: those of some models that see leave out all that is not in parts."""
    template = str(tokenizer.chat_template)
    if template not in _PARTS_ALONE:
        shown = [_shows_mark(tokenizer, messages) for messages in (_ASKED, in_parts(_ASKED))]
        _PARTS_ALONE[template] = shown == [False, True]
    return in_parts(messages) if _PARTS_ALONE[template] else list(messages)


def in_parts(messages: Messages) -> list[Mapping[str, Any]]:
    """Return messages whose texts are lists of parts, as `{"type": "text", "text": ...}`."""
    return [
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content := message.get("content"), str)
        else message
        for message in messages
    ]


def text_of(content: Any) -> str | None:
    """Return what a message's content says in words, text or parts; None where that is nothing."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text") or None
    return content if isinstance(content, str) else None


_ASKED = [{"role": "user", "content": _MARK}]
#: By template, whether it shows what is in parts alone.
_PARTS_ALONE: dict[str, bool] = {}


def _shows_mark(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> bool:
    try:
        return _MARK in _rendered(tokenizer, messages, {}, False)
    except DataError:
        return False


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any], generation: bool
) -> str:
    try:
        with _limited(_SECONDS):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **options
            )
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses it: {first_line(error)}") from None
    except _TooLongError:
        raise DataError(f"the chat template does not end within {_SECONDS:.0f} seconds") from None
    except Exception as error:  # a template can do anything
        raise DataError(
            f"the chat template cannot render it ({type(error).__name__}: {first_line(error)}); does it take such "
            "chats?"
        ) from None
    if not isinstance(text, str):
        raise DataError(f"the chat template makes {type(text).__name__} of it, not text")
    return text


class _TooLongError(Exception):
    pass


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt what takes too long: in the main thread, where there are signals for it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def template_options(tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template gets of a row besides its messages: the columns that it asks for by name.

    `chat_template_kwargs` are given as they are, and tools and documents may be JSON text, as in TRL.

    Args:
        tokenizer: With a chat template.
        columns: Other columns of the row.
    """
    found: dict[str, Any] = {}
    if not columns:
        return found
    for name in ("tools", "documents"):
        if (value := columns.get(name)) is not None:
            found[name] = json.loads(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    template = tokenizer.get_chat_template(None, found.get("tools"))
    asked = _variables(template)
    found |= {name: columns[name] for name in asked & columns.keys() - found.keys() if columns[name] is not None}
    return found | dict(columns.get("chat_template_kwargs") or {})


@cache
def _variables(template: str) -> frozenset[str]:
    """Return the names that a template reads and does not set; none where it cannot be parsed."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tags
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(plain))) - _OWN
    except jinja2.TemplateError:
        return frozenset()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
    """Return the token ids of texts; a text that has its beginning-of-sequence token already gets no second one.

    Args:
        tokenizer: Of the model.
        texts: At least one.
        special_tokens: Whether the tokenizer adds those that it adds to every text; a template writes them itself.
    """
    # verbose=False: not a warning for each text that is longer than the model's context; max_length cuts it
    ids: list[list[int]] = tokenizer(list(texts), verbose=False, add_special_tokens=special_tokens)["input_ids"]
    bos = tokenizer.bos_token_id
    return [row[1:] if bos is not None and row[:2] == [bos, bos] else row for row in ids]


def refuse_broken_text(value: Any) -> None:
    """Raise DataError where there is half of a surrogate pair in a text, or in texts anywhere in a value.

    JSON can spell it, and Python keeps it, as it keeps the bytes of a command line that are not UTF-8; it is no text.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
    except UnicodeEncodeError as error:
        broken = error.object[error.start : error.start + 1]
        raise DataError(
            f"has {broken.encode('unicode_escape').decode()} at character {error.start}, which is half of a character "
            "or a byte that is not UTF-8; cut it out, or write the text anew"
        ) from None


def turn_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    turns: Sequence[tuple[int, int]],
    options: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat as text, and where some of its turns stand in it.

    Args:
        tokenizer: With a chat template.
        messages: The chat.
        turns: First message of each and that after its last, in order.
        options: As for `render`.

    Returns:
        The text, and for each turn the characters from and to; both are the same where it is not found.

    Raises:
        DataError: If the chat cannot be rendered.
    """
    return _Chat(lambda part, generation: render(tokenizer, part, options, generation=generation), messages).spans(
        turns
    )


class _Chat:
    """A chat, to be rendered in parts and with a turn that says something else.

    Args:
        render: Renders messages, with a generation prompt or without.
        messages: All of them.
    """

    def __init__(self, render: Callable[[Messages, bool], str], messages: Messages) -> None:
        self._render, self.messages = render, list(messages)
        self.whole = render(self.messages, False)

    def spans(self, turns: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        found: list[tuple[int, int]] = []
        for first, last in turns:
            before = found[-1][1] if found else 0
            start, end = self._start(first, before), self._end(last)
            shown = start is not None and end is not None and self._shows(self.messages[first:last], start, end)
            found.append((start, end) if shown else (before, before))  # type: ignore[arg-type]
        return self.whole, found

    def _shows(self, messages: Messages, start: int, end: int) -> bool:
        """Say whether what messages say is there: some templates leave out calls of tools, or text that is no part."""
        text = self.whole[start:end]
        words = [word for m in messages if isinstance(c := m.get("content"), str) for word in c.split()[-1:]]
        words += [call.get("function", call).get("name", "") for m in messages for call in m.get("tool_calls") or []]
        return start < end and all(word in text for word in words)

    def _start(self, first: int, before: int) -> int | None:
        """Where the message `first` begins, after `before`."""
        opened = self._rendered(self.messages[:first], True) if first else None
        if opened is not None and self.whole.startswith(opened):
            return len(opened)
        region = _changed(self._render, self.messages, first, self.whole)
        if region is None:
            return None
        prompt = self._generation_prompt(first, opened)
        for length in range(len(prompt), len(prompt) // 2, -1):
            if (at := self.whole.rfind(prompt[:length], before, region[0])) >= 0:
                return at + length
        return region[0]

    def _end(self, last: int) -> int | None:
        """Where the message before `last` ends."""
        if last == len(self.messages):
            return len(self.whole)
        shorter = self._rendered(self.messages[:last], False)
        if shorter is not None and self.whole.startswith(shorter):
            return len(shorter)
        region = _changed(self._render, self.messages, last - 1, self.whole)
        if region is None:
            return None
        tail = ""
        if shorter is not None and (own := _changed(self._render, self.messages[:last], last - 1, shorter)) is not None:
            tail = shorter[own[1] :]
        elif (own := _changed(self._render, self.messages, len(self.messages) - 1, self.whole)) is not None:
            tail = self.whole[own[1] :]
        return region[1] + _common(tail, self.whole[region[1] :])

    def _generation_prompt(self, first: int, opened: str | None) -> str:
        """What asks the model to write: what a generation prompt adds to a chat."""
        closed = self._rendered(self.messages[:first], False) if opened is not None else None
        if opened is None or closed is None or not opened.startswith(closed):
            opened, closed = self._rendered(self.messages, True), self.whole
        return opened[len(closed) :] if opened is not None and opened.startswith(closed) else ""

    def _rendered(self, messages: Messages, generation: bool) -> str | None:
        try:
            return self._render(messages, generation)
        except DataError:  # a part of a chat may be none
            return None


def _changed(
    render: Callable[[Messages, bool], str], messages: list[Mapping[str, Any]], at: int, text: str
) -> tuple[int, int] | None:
    """Return the characters of a chat that change when a message says something else; None where none do."""
    try:
        other = render([*messages[:at], _saying_else(messages[at]), *messages[at + 1 :]], False)
    except DataError:
        return None
    if other == text:
        return None
    start = _common(text, other)
    same = _common(text[start:][::-1], other[start:][::-1])
    return start, len(text) - same


def _saying_else(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if key in _STRUCTURE else _marked(key, value) for key, value in message.items()}


def _marked(key: str, value: Any) -> Any:
    """Return a value of the same form with other texts in it."""
    if isinstance(value, str):
        return json.dumps({_MARK: _MARK}) if key == "arguments" else _MARK if value else value
    if isinstance(value, Mapping):
        return {_MARK: _MARK} if key == "arguments" and value else _saying_else(value)
    if isinstance(value, list):
        return [_marked(key, item) for item in value]
    return value


def _common(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
