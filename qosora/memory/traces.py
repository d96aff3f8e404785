"""What has been traced of a model, remembered: a step is traced once on a machine, and then its figures are read.

They are kept with all that they depend on: the model's configuration, how it is decomposed, the step's options, the
versions of what computes, and qosora's own code. Models with code of their own are traced each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from qosora.config import QosoraConfig
from qosora.memory.options import Batch, Prediction, StepOptions
from qosora.memory.tracer import Site
from qosora.remembered import code_state, recall, remember

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from qosora.memory.predict import TracedModel

__all__ = ["Facts", "Traces"]

_COMPUTES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Facts:
    """What is known of a traced model.

    Attributes:
        trained_parameters: Elements of all that is trained.
        paged_bytes: Bytes of optimizer states in managed memory.
        attention: The implementation of attention.
        loss_chunk: The most tokens of which TRL computes the loss at once.
        layer_products: Multiplications of a decoder layer's forward for each token.
        largest_layer: Bytes of the largest decoder layer's stored matrices.
        host_bytes: Bytes of the base that a process keeps in host memory.
    """

    trained_parameters: int
    paged_bytes: int
    attention: str
    loss_chunk: int
    layer_products: int
    largest_layer: int
    host_bytes: int


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

        _loss_chunk()  # first: it says in a line if TRL is another than was tried
        return TracedModel(*self._of)

    @cached_property
    def facts(self) -> Facts:
        """What the planner asks of a model beside its steps."""

        def of_model() -> dict[str, Any]:
            names = (field.name for field in fields(Facts) if field.name != "loss_chunk")
            return {"loss_chunk": _loss_chunk(), **{name: getattr(self.model, name) for name in names}}

        return self._fact("facts", of_model, lambda known: Facts(**known))

    def predict(self, batch: Batch, inputs: Mapping[str, torch.Tensor] | None = None) -> Prediction:
        """Return the peak of a step on a batch; with the batch itself, this is not remembered."""
        if inputs is not None:
            return self.model.predict(batch, inputs)
        return self._fact(f"batch {json.dumps(asdict(batch))}", lambda: _plain(self.model.predict(batch)), _read)

    def _fact(self, name: str, make: Callable[[], dict[str, Any]], read: Callable[[Any], _T]) -> _T:
        if name in self._known:
            with suppress(KeyError, TypeError, ValueError):  # a file that somebody has changed
                return read(self._known[name])
        self._known[name] = made = make()
        if self._subject:
            remember(self._subject, {name: made})
        return read(made)


def _loss_chunk() -> int:
    from qosora.compat.trl import TOKEN_CHUNK_SIZE

    return int(TOKEN_CHUNK_SIZE)


def _plain(found: Prediction) -> dict[str, Any]:
    return {**asdict(found), "sites": [[*site, total] for site, total in found.sites.items()]}


def _read(plain: Any) -> Prediction:
    sites = {Site(*site): total for *site, total in plain["sites"]}
    return Prediction(**{**plain, "site": Site(*plain["site"]), "sites": sites})


def _key(config: PreTrainedConfig, storage: QosoraConfig, options: StepOptions) -> str:
    described = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    parts = [type(config).__name__, described, storage.to_dict(), asdict(options), code_state(_COMPUTES)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
