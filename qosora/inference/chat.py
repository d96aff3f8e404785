"""A conversation with a model, with one of its adapters or without any, in turns that a chat template renders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qosora.base import load_adapter
from qosora.checkpoints import sees
from qosora.data import open_image
from qosora.errors import ConfigError, DataError, near_miss
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
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._images: list[Any] = []  # of the messages
        self._shown: list[Any] = []  # with the next one

    def show(self, image: str | Path) -> None:
        """Show an image with the next message, before its text.

        Raises:
            DataError: It cannot be read, or the model takes none.
        """
        if not sees(self.model.config):
            raise DataError("the model takes no images")
        self._shown.append(open_image(str(image), Path()))

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
        """Return what is answered to a message, and to what was shown with it; all is remembered.

        Args:
            text: Of the user.
            show: Called with each piece of the answer as it comes.

        Raises:
            DataError: The chat cannot be rendered, or does not fit the model.
        """
        messages = [*self.messages, self._said(text)]
        said = self._generate(self.speaker, messages, show)
        self.messages = [*messages, {"role": "assistant", "content": said}]
        self._images, self._shown = [*self._images, *self._shown], []
        return said

    def compare(self, text: str) -> dict[str, str]:
        """Return what each of the speakers would answer to a message, and to what was shown; nothing is remembered.

        Raises:
            DataError: As of `answer`.
        """
        messages = [*self.messages, self._said(text)]
        return {name: self._generate(name, messages, None) for name in self._names}

    def _said(self, text: str) -> dict[str, Any]:
        places = [{"type": "image"}] * len(self._shown)
        return {"role": "user", "content": [*places, {"type": "text", "text": text}] if places else text}

    def _generate(self, name: str, messages: list[dict[str, Any]], show: Callable[[str], None] | None) -> str:
        images = [[*self._images, *self._shown]]
        with self._speaking(name):
            return generate(self.model, self.tokenizer, [messages], images=images, streamed=show, **self.options)[0]

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
