"""`OsoraConfig`: what is trained on a base. It is a PEFT config, which puts trainable vectors on decomposed layers."""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from qosora import formats, register
from qosora.errors import ConfigError
from qosora.patterns import pattern_problem
from qosora.places import place_of, published_name

__all__ = ["OSORA", "OsoraConfig"]

VECTORS = ("both", "s", "o")
_CARD = "README.md"


class _OsoraType(str):
    """PEFT's enum of adapter types is closed to outsiders: a string that has an enum member's `value` stands in."""

    @property
    def value(self) -> str:
        return str(self)


OSORA = _OsoraType("OSORA")


@dataclass
class OsoraConfig(PeftConfig):
    """What is trained on a qosora base.

    Args:
        vectors: Which vectors are trained: "both", "s" (singular values) or "o" (output scales). The others stay at
            the base's values.
        update_rank: Rank k of a matrix B A that is trained beside them and added to each layer's weight, as LoRA's is;
            A (k, in_features) starts at random and B (out_features, k) at zero. 0 trains the vectors alone, which is
            OSoRA. With 1, two more vectors a layer.
        target_modules: Names, or a regular expression, of the decomposed layers to adapt; all by default.
        exclude_modules: Names, or a regular expression, of layers to leave out.
        layers_to_transform: Indices of the transformer layers to adapt; all by default.
        layers_pattern: Name of the layer list, where it is not "layers" or "h".
        modules_to_save: Other modules to train and save in full, as with LoRA.
        trainable_token_indices: Tokens whose embeddings are trained, such as new ones, as with LoRA: ids, or ids by the
            name of the embeddings.
        base_fingerprint: Identity of the base that the adapter was trained on; filled in.
        weights_sha256: Of the adapter's tensors, in what is saved; filled in.
        format_version: Of what is saved; filled in.

    Example:
        >>> model = get_peft_model(model, OsoraConfig())  # doctest: +SKIP
    """

    task_type: Any = "CAUSAL_LM"
    vectors: str = field(default="both", metadata={"help": "Vectors to train: both, s or o."})
    update_rank: int = field(default=0, metadata={"help": "Rank of a trained matrix added to each weight."})
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    base_fingerprint: str | None = None
    weights_sha256: str | None = None
    format_version: int = formats.ADAPTER

    def __post_init__(self) -> None:
        formats.require_known(ADAPTER_CONFIG, self.format_version, formats.ADAPTER)
        self.format_version = self._version()
        super().__post_init__()
        self.peft_type = OSORA
        problems = []
        if self.vectors not in VECTORS:
            problems.append(f"vectors must be one of {', '.join(VECTORS)}, got {self.vectors!r}")
        if type(self.update_rank) is not int or self.update_rank < 0:
            problems.append(f"update_rank must be an integer of at least 0, got {self.update_rank!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern says where the indices in layers_to_transform count; give both or neither")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            problems += self._problems_of_names(name, getattr(self, name))
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, (list, tuple)) else [layers]
        if layers is not None and not all(type(i) is int and i >= 0 for i in indices):
            problems.append(f"layers_to_transform must be an index or a list of them, got {layers!r}")
        tokens = self.trainable_token_indices
        for ids in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
            if not isinstance(ids, (list, tuple)) or not ids or not all(type(i) is int and i >= 0 for i in ids):
                problems.append(f"trainable_token_indices must be ids of tokens, at least one, got {ids!r}")
        if problems:
            raise ConfigError(problems)
        for name in ("target_modules", "exclude_modules"):  # PEFT tests membership
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        base: str | None = self.__dict__.get("base_model_name_or_path")
        if isinstance(base, str):
            self.base_model_name_or_path = place_of(base, key=self.base_fingerprint)

    @staticmethod
    def _problems_of_names(option: str, value: object) -> list[str]:
        single = option != "modules_to_save"
        if value is None:
            return []
        if isinstance(value, str) and single:
            why = pattern_problem(value)
            return [f"{option} {value!r} {why}"] if why else []
        if isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value):
            return [f"{option} {name!r} {why}" for name in value if (why := pattern_problem(name))]
        return [f"{option} must be a list of names{' or a regular expression' * single}, got {value!r}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data; sets are sorted, so that equal configs make equal files."""
        plain = asdict(self)
        own = {"peft_type": str(OSORA), "format_version": self._version()}  # TRL may have added tokens
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()} | own

    def _version(self) -> int:
        return formats.ADAPTER if self.trainable_token_indices else formats.ADAPTER_WITHOUT_TOKENS

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json as any PEFT config does, with a hash of the adapter's tensors if they are there.

        Names a base on this machine as `qosora.places` has it, and takes its path out of PEFT's model card.
        """
        folder, written = Path(save_directory), copy.copy(self)
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():  # PEFT writes them first
            with weights.open("rb") as stream:
                written.weights_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        place = self.base_model_name_or_path
        if place:
            written.base_model_name_or_path = published_name(place, folder, self.base_fingerprint)
        super(OsoraConfig, written).save_pretrained(save_directory, **kwargs)
        if written.base_model_name_or_path != place and (folder / _CARD).is_file():
            card = ModelCard.load(folder / _CARD)
            card.data.base_model = None
            card.data.tags = [tag for tag in card.data.tags or () if not tag.startswith("base_model:")] or None
            card.save(folder / _CARD)


register.loaded(__name__)
