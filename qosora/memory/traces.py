"""What has been traced of a model, remembered: a step is traced once on a machine, and then its figures are read.

They are kept with all that they depend on: the model's configuration, how it is decomposed, the step's options, the
versions of what computes, and qosora's own code. Models with code of their own are traced each time.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qosora.config import QosoraConfig
from qosora.memory.options import Batch, Prediction, StepOptions
from qosora.memory.tracer import Site
from qosora.remembered import recall, remember

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qosora.memory.predict import TracedModel

__all__ = ["Traces"]

_COMPUTES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
_T = TypeVar("_T")


class Traces:
    """A model whose steps are traced where that is not remembered.

    Args:
        config: Of the model.
        storage: How it is decomposed.
        options: Of the step.
    """

    def __init__(self, config: PreTrainedConfig, storage: QosoraConfig, options: StepOptions) -> None:
        self._of = config, storage, options
        own_code = not type(config).__module__.startswith("transformers.models.")
        self._subject = None if own_code else f"plans/{_key(config, storage, options)}"
        self._known = recall(self._subject) if self._subject else {}

    @cached_property
    def model(self) -> TracedModel:
        """The model itself, made at first use."""
        from qosora.memory.predict import TracedModel

        self._fact("loss_chunk", _loss_chunk)  # first: it says in a line if TRL is another than was tried
        return TracedModel(*self._of)

    @property
    def trained_parameters(self) -> int:
        """Elements of all that is trained."""
        return self._fact("trained_parameters", lambda: self.model.trained_parameters)

    @property
    def paged_bytes(self) -> int:
        """Bytes of optimizer states in managed memory."""
        return self._fact("paged_bytes", lambda: self.model.paged_bytes)

    @property
    def attention(self) -> str:
        """The implementation of attention."""
        return self._fact("attention", lambda: self.model.attention)

    @property
    def loss_chunk(self) -> int:
        """The most tokens of which TRL computes the loss at once."""
        return self._fact("loss_chunk", _loss_chunk)

    @property
    def layer_products(self) -> int:
        """Multiplications of a decoder layer's forward for each token."""
        return self._fact("layer_products", lambda: self.model.layer_products)

    @property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer's stored matrices."""
        return self._fact("largest_layer", lambda: self.model.largest_layer)

    @property
    def host_bytes(self) -> int:
        """Bytes of the base that a process keeps in host memory."""
        return self._fact("host_bytes", lambda: self.model.host_bytes)

    def predict(self, batch: Batch) -> Prediction:
        """Return the peak of a step on a batch."""
        found = self._fact(f"batch {json.dumps(asdict(batch))}", lambda: _plain(self.model.predict(batch)))
        try:
            sites = {Site(*site): total for *site, total in found["sites"]}
            return Prediction(**{**found, "site": Site(*found["site"]), "sites": sites})
        except (KeyError, TypeError, ValueError):  # a file that somebody has changed
            return self.model.predict(batch)

    def _fact(self, name: str, make: Callable[[], _T]) -> _T:
        if name not in self._known:
            self._known[name] = made = make()
            if self._subject:
                remember(self._subject, {name: made})
        found: _T = self._known[name]
        return found


def _loss_chunk() -> int:
    from qosora.compat.trl import TOKEN_CHUNK_SIZE

    return int(TOKEN_CHUNK_SIZE)


def _plain(found: Prediction) -> dict[str, Any]:
    return {**asdict(found), "sites": [[*site, total] for site, total in found.sites.items()]}


def _key(config: PreTrainedConfig, storage: QosoraConfig, options: StepOptions) -> str:
    described = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    versions = [platform.python_version(), *map(version, _COMPUTES), _code()]
    parts = [type(config).__name__, described, storage.to_dict(), asdict(options), versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _code() -> list[Any]:
    """What tells one state of qosora's own code from another."""
    folder = Path(__file__).parent.parent
    files = ((file, file.stat()) for file in sorted(folder.rglob("*.py")))
    return [[file.relative_to(folder).as_posix(), found.st_size, found.st_mtime_ns] for file, found in files]
