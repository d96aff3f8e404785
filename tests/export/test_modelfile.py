"""Modelfiles: a Go template that writes what the chat template writes, or none; stop tokens; Ollama's grammar."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import qosora.demo
from qosora.export.modelfile import modelfile, read_turns

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
GEMMA = (
    "{{ bos_token }}{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{% set who = 'model' if m['role'] == 'assistant' else 'user' %}{% set now = loop.index0 == (1 if first else 0) %}"
    "{{ '<start_of_turn>' + who + '\n' + (first if now else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ALWAYS_ASKS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{{ '<|start|>assistant<|end|>\n\n' }}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
COUNTED = "{% for m in messages %}{{ '<' + m['role'] + loop.index | string + '>' + m['content'] }}{% endfor %}"
DATED = "{{ strftime_now('%d') }}" + CHATML
BRACES = "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(qosora.demo.__file__).parent / "assets" / "model")


def written_by_go(template: str, messages: list[tuple[str, str]]) -> str:
    """What Go's text/template makes of what these templates use of it: if, else if, eq, range, variables."""
    system = next((content for role, content in messages if role == "system"), "")
    code, depth = ["out = []", "held = ''"], 0
    for text, action in re.findall(r"(.*?)(?:\{\{ (.*?) \}\}|$)", template, re.DOTALL):
        if text:
            code.append("    " * depth + f"out.append({text!r})")
        where = {
            ".Content": "content", "$system": "held", '"{{"': "'{{'",
        }.get(action)  # fmt: skip
        if where:
            code.append("    " * depth + f"out.append({where})")
        elif action == "range .Messages":
            code.append("    " * depth + "for role, content in messages:")
            depth += 1
            code.append("    " * depth + "pass")
        elif action == "end":
            depth -= 1
        elif found := re.fullmatch(r"(else )?if (eq \.Role (\".*\")|\.System|\$system)", action or ""):
            depth -= bool(found[1])
            test = f"role == {found[3]}" if found[3] else {".System": "system", "$system": "held"}[found[2]]
            code.append("    " * depth + f"{'el' if found[1] else ''}if {test}:")
            depth += 1
            code.append("    " * depth + "pass")
        elif action == "else":
            code.append("    " * (depth - 1) + "else:")
            code.append("    " * depth + "pass")
        elif found := re.fullmatch(r"\$system :?= (.*)", action or ""):
            code.append("    " * depth + f"held = {'content' if found[1] == '.Content' else found[1]}")
        else:
            assert not action, action
    assert depth == 0
    names: dict[str, Any] = {"messages": messages, "system": system}
    exec("\n".join(code), names)
    return "".join(names["out"])


@pytest.mark.parametrize(
    ("template", "takes_system"),
    [
        pytest.param(None, True, id="demo"),
        pytest.param(CHATML, True, id="chatml"),
        pytest.param(DEFAULT_SYSTEM, True, id="default system"),
        pytest.param(GEMMA, True, id="gemma"),
        pytest.param(ALWAYS_ASKS, True, id="always asks"),
        pytest.param(NO_SYSTEM, False, id="no system"),
        pytest.param(BRACES, True, id="braces"),
    ],
)
def test_go_writes_what_jinja_writes(tokenizer: Any, template: str | None, takes_system: bool):
    if template is not None:
        tokenizer.chat_template = template
    turns = read_turns(tokenizer)
    assert turns is not None
    assert (turns.system is not None) == takes_system
    talk = [("user", "Hi, {you}"), ("assistant", "a\nb"), ("user", "And?")]
    for messages in (talk[:1], talk, *([[("system", "Be brief."), *talk]] if takes_system else [])):
        chat = [{"role": role, "content": content} for role, content in messages]
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert written_by_go(turns.go_template(), messages) == expected.removeprefix(tokenizer.bos_token)


@pytest.mark.parametrize("template", [COUNTED, DATED, "{{ raise_exception('never') }}", "no messages at all"])
def test_what_does_more_than_put_text_around_messages_has_none(tokenizer: Any, template: str):
    tokenizer.chat_template = template
    assert read_turns(tokenizer) is None
    text = modelfile("a.gguf", tokenizer, {})
    assert "TEMPLATE " not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    assert "so it has no TEMPLATE here" in text


def instructions(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama documents it: `# comment`, `INSTRUCTION arguments`, lines between three quotes."""
    found = []
    pattern = re.compile(r'\s*(?:#[^\n]*|([A-Z]+) +(?:"""(.*?)"""|([^\n]*)))(?:\n|$)', re.DOTALL)
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        assert match, text[position:]
        position = match.end()
        if match[1]:
            found.append((match[1], match[2] if match[2] is not None else match[3]))
    return found


def test_the_grammar(tokenizer: Any):
    settings = {"eos_token_id": [2, 1], "do_sample": True, "temperature": 0.7, "top_k": 64, "repetition_penalty": 1.1}
    name, *rest = instructions(modelfile("my-Q8_0.gguf", tokenizer, settings))
    assert name == ("FROM", "./my-Q8_0.gguf")
    assert rest[0][0] == "TEMPLATE"
    assert rest[1:] == [
        ("PARAMETER", 'stop "<eos>"'),
        ("PARAMETER", 'stop "<bos>"'),
        ("PARAMETER", "temperature 0.7"),
        ("PARAMETER", "top_k 64"),
        ("PARAMETER", "repeat_penalty 1.1"),
    ]


def test_without_a_template_and_settings(tokenizer: Any):
    tokenizer.chat_template = None
    found = instructions(modelfile("a.gguf", tokenizer, {"do_sample": False}))
    assert found == [("FROM", "./a.gguf"), ("PARAMETER", 'stop "<eos>"'), ("PARAMETER", "temperature 0")]
    tokenizer.chat_template = NO_SYSTEM
    assert "takes no system message" in modelfile("a.gguf", tokenizer, {})
