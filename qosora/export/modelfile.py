"""An Ollama Modelfile: the GGUF file, its chat template in Go's language, where a reply stops, how it is drawn.

A chat template is a program in Jinja; Ollama wants one in Go's. They are not translated: the template is asked to write
conversations of known messages, what stands around these is read off, and it is checked that a Go template of these
pieces writes other conversations in the very same way. What does more than put text around messages is left out, and
the Modelfile says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

__all__ = ["Turns", "modelfile", "read_turns"]

_USER, _REPLY, _SYSTEM = "QzUserZq", "QzReplyZq", "QzSystemZq"
#: What conversations the pieces must write as the template does.
_CHECKED = (
    [("user", "a b"), ("assistant", "c"), ("user", "1 + 1?"), ("assistant", "2."), ("user", "And 2 + 2?")],
    [("user", "x\ny")],
)
#: Of a generation config, by the names that Ollama has for them.
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around messages.

    Attributes:
        opening: At the very beginning, where there is no system message; without the token that begins every text.
        opening_with_system: There, with one.
        system: Around a system message; None where there can be none.
        within: Whether the system message is a part of the first user's, behind what that begins with.
        user: Around a user's.
        assistant: Around a reply.
        prompt: What a reply is to follow.
    """

    opening: str
    opening_with_system: str
    system: tuple[str, str] | None
    within: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def write(self, messages: Sequence[tuple[str, str]]) -> str:
        """Write a conversation as the Go template of `go_template` does, ready for a reply."""
        system = ""
        text = self.opening_with_system if any(role == "system" for role, _ in messages) else self.opening
        for role, content in messages:
            if role == "system" and self.system is not None:
                if self.within:
                    system = f"{self.system[0]}{content}{self.system[1]}"
                else:
                    text += f"{self.system[0]}{content}{self.system[1]}"
            elif role == "user":
                text += f"{self.user[0]}{system}{content}{self.user[1]}"
                system = ""
            elif role == "assistant":
                text += f"{self.assistant[0]}{content}{self.assistant[1]}"
        return text + self.prompt

    def go_template(self) -> str:
        """Return the template in Go's language, with Ollama's variables."""
        opening = _go(self.opening)
        if self.opening_with_system != self.opening:
            opening = f"{{{{ if .System }}}}{_go(self.opening_with_system)}{{{{ else }}}}{opening}{{{{ end }}}}"
        system, held = "", ""
        if self.system is not None and self.within:
            opening = f'{{{{ $system := "" }}}}{opening}'
            system = '{{ if eq .Role "system" }}{{ $system = .Content }}{{ else '
            held = (
                f"{{{{ if $system }}}}{_go(self.system[0])}{{{{ $system }}}}{_go(self.system[1])}"
                '{{ $system = "" }}{{ end }}'
            )
        elif self.system is not None:
            around = f"{_go(self.system[0])}{{{{ .Content }}}}{_go(self.system[1])}"
            system = f'{{{{ if eq .Role "system" }}}}{around}{{{{ else '
        return (
            f'{opening}{{{{ range .Messages }}}}{system or "{{ "}if eq .Role "user" }}}}'
            f"{_go(self.user[0])}{held}{{{{ .Content }}}}{_go(self.user[1])}"
            f'{{{{ else if eq .Role "assistant" }}}}{_go(self.assistant[0])}{{{{ .Content }}}}{_go(self.assistant[1])}'
            f"{{{{ end }}}}{{{{ end }}}}{_go(self.prompt)}"
        )


def _go(text: str) -> str:
    """Return text as a Go template writes it."""
    return text.replace("{{", '{{ "{{" }}')


def read_turns(tokenizer: Any) -> Turns | None:
    """Return what a tokenizer's chat template puts around messages; None where it does more than that, or is not there.

    Args:
        tokenizer: Of transformers.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template or "strftime_now" in template:  # of which one day would be kept
        return None
    with suppress(Exception):  # a template may refuse a conversation in any way
        plain = _read(tokenizer, system=False)
        if plain is not None and _agrees(tokenizer, plain, ()):
            with suppress(Exception):
                full = _read(tokenizer, system=True)
                if full is not None and _agrees(tokenizer, full, ()) and _agrees(tokenizer, full, [("system", "s t")]):
                    return full
            return plain
    return None


def _rendered(tokenizer: Any, messages: Sequence[tuple[str, str]], prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    # llama.cpp and Ollama put that token before every text, as the tokenizer does
    return text.removeprefix(tokenizer.bos_token or "")


def _read(tokenizer: Any, *, system: bool) -> Turns | None:
    chat = [("user", _USER), ("assistant", _REPLY), ("user", _USER)]
    head, between, more = _rendered(tokenizer, chat[:2], False).replace(_REPLY, _USER).split(_USER)
    _, _, follows, tail = _rendered(tokenizer, chat, False).replace(_REPLY, _USER).split(_USER)
    # Some templates ask for a reply at the end, whether they are to or not
    more = commonprefix([more, follows])  # noqa: RUF071  (not paths)
    user = follows.removeprefix(more), tail
    if not head.endswith(user[0]) or not between.startswith(tail):
        return None
    prompt = _rendered(tokenizer, chat[:1], True).removeprefix(f"{head}{_USER}{tail}")
    opening, assistant = head.removesuffix(user[0]), (between.removeprefix(tail), more)
    if not system:
        return Turns(opening, opening, None, False, user, assistant, prompt)
    before, rest = _rendered(tokenizer, [("system", _SYSTEM), ("user", _USER)], False).split(_SYSTEM)
    behind, _ = rest.split(_USER)
    if behind.endswith(user[0]) and user[0]:
        # Where a system's turn begins and the opening ends cannot be told apart, and need not be
        return Turns(opening, "", (before, behind.removesuffix(user[0])), False, user, assistant, prompt)
    start, inner, prefix = before.partition(user[0])
    return Turns(opening, start, (prefix, behind), True, user, assistant, prompt) if inner or not user[0] else None


def _agrees(tokenizer: Any, turns: Turns, before: Sequence[tuple[str, str]]) -> bool:
    chats = [[*before, *chat] for chat in _CHECKED]
    return all(turns.write(chat) == _rendered(tokenizer, chat, True) for chat in chats)


def modelfile(file: str, tokenizer: Any, generation: Mapping[str, Any]) -> str:
    """Return a Modelfile.

    Args:
        file: Name of the GGUF file, which is to be in the same folder.
        tokenizer: Of transformers.
        generation: A model's generation config, as in its file.
    """
    lines = [f"# ollama create MY-MODEL -f Modelfile\nFROM ./{file}"]
    turns = read_turns(tokenizer)
    if turns is not None:
        lines.append(f"TEMPLATE {_quoted(turns.go_template())}")
        if turns.system is None:
            lines.append("# This model's chat template takes no system message.")
    elif getattr(tokenizer, "chat_template", None):
        lines.append(
            "# This model's chat template does more than put text around messages, so it has no TEMPLATE here.\n"
            "# Ollama takes its own where it knows the one in the GGUF file; see `ollama show --template MY-MODEL`."
        )
    ends = generation.get("eos_token_id", tokenizer.eos_token_id)
    for token in dict.fromkeys(ends if isinstance(ends, list) else [ends]):
        if token is not None:
            lines.append(f"PARAMETER stop {_quoted(tokenizer.convert_ids_to_tokens(token))}")
    if generation.get("do_sample"):
        lines += [
            f"PARAMETER {theirs} {generation[ours]}" for ours, theirs in _SAMPLING.items() if generation.get(ours)
        ]
    elif generation.get("do_sample") is False:
        lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
