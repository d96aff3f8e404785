"""What a plain checkpoint of a model holds, from its class on the meta device: no weight is allocated.

Tensors on disk have the names of a plain checkpoint. For some models these are not the names in memory, and an adapter
has the latter: `PlainModel` translates as transformers' own loader does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qosora.checkpoints import CONFIG_NAME, CheckpointReader, TensorReader, empty_model, load_config
from qosora.compat.transformers import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    float32_patterns,
    get_model_conversion_mapping,
    makes,
    optional_tensors,
    rename_source_key,
    revert_weight_conversion,
    target_patterns,
    tied_weights,
)
from qosora.errors import CheckpointError, QosoraError, first_line
from qosora.formats import BASE, BASE_WITHOUT_STACKS
from qosora.layers import (
    Stack,
    layer_of_stack,
    linear_layers,
    parts_on_disk,
    split_experts,
    take_apart,
    without_stacking,
)

__all__ = ["PlainModel", "natural_order", "stored_otherwise", "take_stacks_apart"]


class PlainModel:
    """The names, shapes and ties of a model's tensors.

    Args:
        folder: With a `config.json`; a quantization config in it is ignored.
        trust_remote_code: Whether to run model code that is in the folder.
        vocabulary: Rows of the embeddings, where they are not as config.json has them.
        stacks: Format of the bases that have the experts that are layers of their own, and not in one tensor; that
            of a base in the folder, by default, and where there is no base none are.

    Attributes:
        model: The model on the meta device, its experts taken apart as `qosora.layers.experts` does where it can.
        class_name: Of the model.
        shapes: Of all tensors in the model's state, by name.
        transposed: Layers that store their weight as (in_features, out_features): GPT-2's `Conv1D`.
        tied: Parameters that share the value of another: name -> name of the other.
        stacks: Parameters, also on disk, that are taken apart into layers, and what they were.
        stacks_format: `stacks`, as given or found.
        stacks_on_disk: Names in a plain checkpoint of the parameters that are taken apart.
    """

    def __init__(
        self, folder: Path, trust_remote_code: bool, vocabulary: int | None = None, *, stacks: int | None = None
    ) -> None:
        try:
            config = load_config(folder, trust_remote_code=trust_remote_code)
            storage = vars(config).pop("quantization_config", None)
            if vocabulary is not None:
                config.get_text_config().vocab_size = vocabulary
            with torch.device("meta"):
                model: PreTrainedModel = empty_model(config, trust_remote_code)
        except QosoraError:
            raise
        except Exception as error:  # a class of transformers may fail in any way on what it did not expect
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: transformers cannot build this model, so its plain form is unknown "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        split_experts(model)
        if stacks is None:
            version = dict(storage).get("format_version") if isinstance(storage, Mapping) else None
            stacks = version if isinstance(version, int) else BASE_WITHOUT_STACKS
        whole = model.state_dict()
        taken, self.stacks_format = take_stacks_apart(model, stacks), stacks
        self.stacks = {name: stack for name, stack in taken.items() if not stack.parts}
        self.stacks_on_disk = {n: next(iter(revert_weight_conversion(model, {n: whole[n]}))) for n in self.stacks}
        self.model = model
        self._state: dict[str, torch.Tensor] = model.state_dict()
        self.class_name = type(model).__name__
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self.tied: dict[str, str] = tied_weights(model)
        transforms = without_stacking(get_model_conversion_mapping(model), model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def apart(self, reader: TensorReader) -> TensorReader:
        """Return a reader of a plain checkpoint, as if it held the layers that stacks are taken apart into."""
        return _Apart(reader, self) if self.stacks else reader

    @property
    def vocabulary(self) -> list[str]:
        """Names of the weights of input embeddings and output layer."""
        ends = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return [f"{name}.weight" for name, module in self.model.named_modules() if any(module is end for end in ends)]

    def locate(self, disk_name: str) -> tuple[str, list[str]]:
        """Return where the loader puts a tensor of a plain checkpoint.

        Returns:
            Its name in the model, and the tensors that it becomes part of: itself, unless the loader converts values
            (as where projections are one tensor each on disk and one for all in memory).
        """
        prefix = self.model.base_model_prefix
        name = rename_source_key(disk_name, self._renamings, [], prefix, self._state)[0]
        final, pattern = rename_source_key(disk_name, self._renamings, self._converters, prefix, self._state)
        if final not in self._state and disk_name in self._state:
            return disk_name, [disk_name]
        if pattern is None:
            return name, [name]
        targets = target_patterns(self._converters, pattern)
        return name, [final, *(final.replace(targets[0], other, 1) for other in targets[1:])]

    def renamed(self, name: str) -> str:
        """Return what the loader calls a tensor that has its name of the model already: of some it changes more."""
        return rename_source_key(name, self._renamings, [], self.model.base_model_prefix, self._state)[0]

    def disk_name(self, name: str) -> str:
        """Return the name that a plain checkpoint has for a parameter of the model."""
        return next(iter(revert_weight_conversion(self.model, {name: self._state[name]})))

    def keeps_float32(self, name: str, dtype: torch.dtype) -> bool:
        """Say whether the model holds a parameter in float32 when it is loaded in `dtype`."""
        return any(re.search(p.replace("*", ".*"), name) for p in float32_patterns(self.model, dtype))

    def tied_to(self, name: str) -> list[str]:
        """Return the parameters that share the value of one."""
        return [other for pair in self.tied.items() if name in pair for other in pair if other != name]

    def missing(self, located: Iterable[str]) -> list[str]:
        """Return the tensors that the model would not get from a checkpoint that holds these."""
        located = set(located)
        located |= {name for pair in self.tied.items() for name in pair if located & set(pair)}
        optional = optional_tensors(self.model)
        return [n for n in self.shapes if n not in located and not any(re.search(p, n) for p in optional)]


class _Apart:
    """The tensors of a reader, with those of experts one by one."""

    def __init__(self, reader: TensorReader, plain: PlainModel) -> None:
        self._reader = reader
        self._place: dict[str, tuple[str, int | None]] = {}
        self._stacks: dict[str, Stack] = {}
        for disk in reader.names():
            _, (first, *more) = plain.locate(disk)
            if more or first not in plain.stacks:
                self._place[disk] = disk, None
                continue
            stack = self._stacks[disk] = plain.stacks[first]
            for i in range(stack.shape[0]):
                self._place[f"{layer_of_stack(first, i)}.weight"] = disk, i

    def names(self) -> list[str]:
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        disk, index = self._place.get(name, (name, None))
        return self._reader.shape(disk) if index is None else self._stacks[disk].shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._place.get(name, (name, None))[0])

    def file(self, name: str) -> Path:
        return self._reader.file(self._place.get(name, (name, None))[0])

    def tensor(self, name: str) -> torch.Tensor:
        disk, index = self._place.get(name, (name, None))
        if index is None:
            return self._reader.tensor(disk)
        reader, place = self._reader, self._stacks[disk].place(index)
        return reader.slice(disk)[place] if isinstance(reader, CheckpointReader) else reader.tensor(disk)[place]


def take_stacks_apart(model: PreTrainedModel, version: int = BASE) -> dict[str, Stack]:
    """Do as `layers.take_apart`, and return what there was."""
    return take_apart(model, parts_on_disk(model), version)


def stored_otherwise(model: PreTrainedModel) -> list[str]:
    """Return the linear layers whose weight is no `NAME.weight` on disk, but a part, or called otherwise."""
    transforms = without_stacking(get_model_conversion_mapping(model, add_legacy=False), model)
    makers = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    state, kinds = model.state_dict(), dict[str, bool]()

    def parts_stay(name: str, stem: str, weight: torch.Tensor) -> bool:
        """Say whether the loader finds what a layer is stored in, by the name of its weight on disk."""
        for part in ("U", "s", "weight_absmax"):
            wanted = f"{name}.{part}"
            known = {**state, wanted: weight}
            if rename_source_key(stem + part, renamings, [], model.base_model_prefix, known)[0] != wanted:
                return False
        return True

    found = []
    for name, module in linear_layers(model).items():
        kind = re.sub(r"\d+", "0", name)
        if kind not in kinds:
            weight = {f"{name}.weight": module.weight}
            made = any(makes(maker, f"{name}.weight") for maker in makers)
            disk = next(iter(revert_weight_conversion(model, weight)))
            plain = not made and disk.endswith("weight")
            kinds[kind] = not (plain and parts_stay(name, disk.removesuffix("weight"), module.weight))
        if kinds[kind]:
            found.append(name)
    return found


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names with numbers by value: layers.2 before layers.10."""
    return sorted(names, key=dot_natural_key)
