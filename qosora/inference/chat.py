"""A conversation with a model, with one of its adapters or without any, in turns that a chat template renders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qosora.base import load_adapter
from qosora.errors import ConfigError, near_miss
from qosora.inference.generation import generate

__all__ = ["BASE", "Chat"]

#: What the model is called without an adapter.
BASE = "base"


class Chat:
    """What was said, and who answers.

    Args:
        model: A base, or a base with an adapter.
        tokenizer: With a chat template.
        name: Of the adapter, if there is one.
        system: What the system says first, if anything.
        **options: Of `generate`: how to sample, and how much.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "adapter",
        system: str | None = None,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._names: dict[str, str | None] = {BASE: None}  # to PEFT's
        self.speaker = BASE
        if isinstance(model, PeftModel):
            self._names[name] = model.active_adapter
            self.speaker = name
        self.begin(system)

    @property
    def speakers(self) -> list[str]:
        """Who can answer: the base and the adapters on it."""
        return list(self._names)

    def begin(self, system: str | None = None) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def add(self, adapter: str | Path) -> str:
        """Load another adapter of the base; return its name, that of its folder.

        Raises:
            CheckpointError: It is not whole.
            FingerprintError: It was trained on another base.
        """
        name = Path(adapter).expanduser().resolve().name
        while name in self._names:
            name += "'"
        inner = f"adapter_{len(self._names)}"  # PEFT's names have no dots
        self.model = load_adapter(self.model, adapter, name=inner).eval()
        self._names[name] = inner
        return name

    def use(self, name: str) -> None:
        """Have the base, or an adapter, answer from now on.

        Raises:
            ConfigError: There is none of that name.
        """
        if name not in self._names:
            raise ConfigError(f"there is no {name!r}{near_miss(name, self._names)}: there are {', '.join(self._names)}")
        self.speaker = name

    def answer(self, text: str, show: Callable[[str], None] | None = None) -> str:
        """Return what is answered to a message; both are remembered.

        Args:
            text: Of the user.
            show: Called with each piece of the answer as it comes.

        Raises:
            DataError: The chat cannot be rendered, or does not fit the model.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        said = self._generate(self.speaker, messages, show)
        self.messages = [*messages, {"role": "assistant", "content": said}]
        return said

    def compare(self, text: str) -> dict[str, str]:
        """Return what each of the speakers would answer to a message; nothing is remembered.

        Raises:
            DataError: As of `answer`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        return {name: self._generate(name, messages, None) for name in self._names}

    def _generate(self, name: str, messages: list[dict[str, str]], show: Callable[[str], None] | None) -> str:
        with self._speaking(name):
            return generate(self.model, self.tokenizer, [messages], streamed=show, **self.options)[0]

    @contextmanager
    def _speaking(self, name: str) -> Iterator[None]:
        inner = self._names[name]
        if not isinstance(self.model, PeftModel):
            yield
        elif inner is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(inner, inference_mode=True)
            yield
