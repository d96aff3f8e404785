"""Where turns stand in chats that templates render in their own ways, and what templates can do wrong."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import trl
from tiny import make_tokenizer

from qosora.data import chat as chats
from qosora.data.chat import encode, refuse_broken_text, render, template_options, turn_spans
from qosora.data.prepared import prepare
from qosora.data.records import load_records
from qosora.data.tokens import IGNORED, tokenize
from qosora.errors import DataError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))

THINKING = "<think>\nhm\n</think>\n\n"
CALL = {"type": "function", "function": {"name": "FIRST", "arguments": {"city": "Rome"}}}
TURNS: dict[str, list[tuple[str, str]]] = {
    "turns": [("user", "one"), ("assistant", "FIRST"), ("user", "two"), ("assistant", "SECOND"), ("user", "three"),
              ("assistant", "THIRD")],
    "system": [("system", "rules"), ("user", "one"), ("assistant", "FIRST"), ("user", "two"), ("assistant", "SECOND")],
    "thinking": [("user", "one"), ("assistant", f"{THINKING}FIRST"), ("user", "two"),
                 ("assistant", f"{THINKING}SECOND")],
    "greeting": [("assistant", "FIRST"), ("user", "two"), ("assistant", "SECOND")],
    "repeated": [("user", "one"), ("assistant", "FIRST"), ("user", "one"), ("assistant", "FIRST"), ("user", "two"),
                 ("assistant", "SECOND")],
}  # fmt: skip
CHATS: dict[str, list[dict[str, Any]]] = {
    name: [{"role": role, "content": content} for role, content in turns] for name, turns in TURNS.items()
}
CHATS["call"] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "FIRST", "content": "sunny"},
    {"role": "assistant", "content": "SECOND"},
]
CHATS["reasoning"] = [
    {**message, "reasoning_content": "hm"} if message["role"] == "assistant" else message for message in CHATS["turns"]
]


def with_template(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def supervised(tokenizer: Any, messages: list[dict[str, Any]], **columns: Any) -> str:
    (example,) = tokenize(load_records([{"messages": messages, **columns}]), tokenizer).examples
    return tokenizer.decode(example.labels[example.labels != IGNORED].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_every_turn_of_the_assistant_and_nothing_else(name: str, caplog: pytest.LogCaptureFixture):
    tokenizer = with_template((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    rendered = 0
    for kind, messages in CHATS.items():
        try:
            render(tokenizer, messages)
        except DataError:  # a chat that this model does not take
            continue
        rendered += 1
        caplog.clear()
        with caplog.at_level(logging.WARNING, "qosora"):
            text = supervised(tokenizer, messages)
        unfound = "of the assistant's turns" in caplog.text
        answers = [
            "FIRST" if m.get("tool_calls") else m["content"].split()[-1] for m in messages if m["role"] == "assistant"
        ]
        missing = [answer for answer in answers if text.count(answer) < answers.count(answer)]
        assert not missing or (unfound and kind == "call"), (kind, text)
        for other in ("one", "two", "three", "rules", "sunny", "system"):
            assert other not in text, (kind, text)
    assert rendered >= 2


def test_a_tool_call_that_the_template_leaves_out_is_told(caplog: pytest.LogCaptureFixture):
    tokenizer = with_template((TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"))
    with caplog.at_level(logging.WARNING, "qosora"):
        assert "SECOND" in supervised(tokenizer, CHATS["call"])
    assert "1 of the assistant's turns, in 1 examples, are not trained on" in caplog.text


PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_shows_parts_alone_gets_parts():
    tokenizer = with_template(PARTS)
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert render(tokenizer, chat[:1], generation=True) == "<user>What?<assistant>"
    assert turn_spans(tokenizer, chat, [(1, 2)]) == ("<user>What?<assistant>That.", [(22, 27)])
    assert tokenize(load_records([{"messages": chat}]), tokenizer).supervised
    for kind, row in (
        ("prompts", {"prompt": chat[:1]}),
        ("preference", {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "No."}]}),
    ):
        (made,) = prepare(load_records([row], form=kind), tokenizer).dataset  # which TRL renders
        assert trl.apply_chat_template({"prompt": made["prompt"]}, tokenizer)["prompt"] == "<user>What?<assistant>"


def test_a_template_that_shows_texts_gets_them_as_they_are():
    tokenizer = with_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert render(tokenizer, [{"role": "user", "content": "What?"}]) == "What?"


def test_columns_that_the_template_asks_for_are_rendered():
    tokenizer = with_template(
        "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{{ mood }}{{ enable_thinking }}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    tool = {"name": "find"}
    columns = {"tools": [tool], "mood": "calm", "id": 7, "chat_template_kwargs": {"enable_thinking": False}}
    assert template_options(tokenizer, columns) == {"tools": [tool], "mood": "calm", "enable_thinking": False}
    assert template_options(tokenizer, {"tools": '[{"name": "find"}]'}) == {"tools": [tool]}
    (example,) = tokenize(load_records([{"messages": CHATS["turns"], **columns}]), tokenizer).examples
    assert tokenizer.decode(example.input_ids.tolist()).startswith("[find]calmFalse<user>one")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system') }}", "the chat template refuses it: no system"),
        ("{{ 'a' + messages[0] }}", "cannot render it (TypeError: can only concatenate str"),
        ("{{ messages[0].content.nothing.at_all }}", "the chat template refuses it: "),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot render it (RecursionError"),
        ("{{ 1 / 0 }}", "cannot render it (ZeroDivisionError"),
        ("{% if %}", "the chat template refuses it: "),
    ],
)
def test_whatever_a_template_does_is_one_line(template: str, said: str):
    with pytest.raises(DataError) as caught:
        tokenize(load_records([{"messages": CHATS["turns"]}]), with_template(template))
    assert str(caught.value).startswith(
        f"the data example 1: {said}" if "refuses" in said else "the data example 1: the"
    )
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chats, "_SECONDS", 0.2)
    endless = with_template("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}")
    with pytest.raises(DataError, match="does not end within 0 seconds"):
        render(endless, CHATS["turns"])
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(render(make_tokenizer(), CHATS["turns"])))
    thread.start()
    thread.join()
    assert found  # where there are no signals, a template that ends works, too


def test_a_text_with_its_begin_token_gets_no_second_one():
    tokenizer = make_tokenizer()
    assert encode(tokenizer, ["<s>ab", "ab"]) == [encode(tokenizer, ["ab"])[0]] * 2
    assert encode(tokenizer, ["<s><s>ab"], special_tokens=False)[0][:2] != [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("value", ["a\ud83d", ["x", {"content": "\udcfc"}]])
def test_half_a_character(value: Any):
    with pytest.raises(DataError, match=r"has .ud.* at character \d+, which is half of a character"):
        refuse_broken_text(value)


def test_where_turns_are_without_tokens():
    text, spans = turn_spans(make_tokenizer(), CHATS["turns"], [(1, 2), (5, 6)])
    assert [text[start:end] for start, end in spans] == ["FIRST</s>", "THIRD</s>"]
