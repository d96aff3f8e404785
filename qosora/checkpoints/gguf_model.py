"""GGUF files as ordinary checkpoints: names and values as transformers' own loader gives them, one tensor at a time.

That loader knows two ways from llama.cpp's tensors to those of a model: tensor processors with a map of names, for most
architectures, and renamings with conversion ops for the newer ones. Both are used here as they are, but lazily.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.utils import logging

from qosora.checkpoints.gguf_file import GgufFile
from qosora.compat.transformers import (
    GGUF_ARCHS,
    TENSOR_PROCESSORS,
    TensorProcessor,
    WeightConverter,
    WeightRenaming,
    converted,
    get_gguf_conversion_mapping,
    gguf_names,
    gguf_values,
    rename_source_key,
    revert_weight_conversion,
)
from qosora.errors import CheckpointError, QosoraError

__all__ = ["GgufReader", "open_gguf"]

_Values = npt.NDArray[np.float32]
#: Experts of a layer in one tensor, and what checkpoints call the part in each expert.
_EXPERTS = re.compile(r"(?P<key>blk\.\d+\.ffn_(?P<part>gate|up|down)_exps)\.weight")
_EXPERT_PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


def open_gguf(path: Path, origin: Path) -> GgufReader:
    """Open a GGUF file.

    Args:
        path: Of the file.
        origin: An empty folder, where its config and tokenizer are written. The config's dtype is bfloat16.

    Raises:
        CheckpointError: If the file is damaged, one of several parts, or of a kind that transformers cannot read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path}: reading GGUF files needs the gguf package; pip install 'qosora[gguf]'")
    file = GgufFile(path)
    if file.parts > 1:
        raise CheckpointError(
            f"{path} is one of {file.parts} parts of a model; make one file of them first: "
            f"llama-gguf-split --merge {path.name} merged.gguf"
        )
    try:
        options = _write_origin(file, origin)
        config = AutoConfig.from_pretrained(origin)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return GgufReader(file, model, options)
    except QosoraError:
        raise
    except Exception as error:  # what fails on a model that transformers does not know depends on the model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: transformers cannot read this {file.architecture!r} model ({reason})"
        ) from error


def _write_origin(file: GgufFile, origin: Path) -> dict[str, Any]:
    """Write config and tokenizer, and return what the config was made of.

    transformers gets outlines of the file: beside the file itself, its tokenizer class would read another tokenizer's
    files. For most architectures its reader of the config takes 25 s for a vocabulary of 262,144 tokens, and these do
    without.
    """
    with TemporaryDirectory(prefix="qosora-") as temporary:
        whole, bare = Path(temporary) / "whole.gguf", Path(temporary) / "bare.gguf"
        file.write_outline(whole, vocabulary=True)
        file.write_outline(bare, vocabulary=False)
        with _silent():  # it warns of the missing vocabulary
            outline = whole if file.architecture in GGUF_ARCHS else bare
            options: dict[str, Any] = PreTrainedConfig.get_config_dict(temporary, gguf_file=outline.name)[0]
        if file.vocabulary:
            options.setdefault("vocab_size", file.vocabulary)
            # the class for any tokenizer.json: AutoTokenizer would read the config again, to say how the same is called
            TokenizersBackend.from_pretrained(temporary, gguf_file=whole.name).save_pretrained(origin)
    config: PreTrainedConfig = CONFIG_MAPPING[options["model_type"]].from_dict(dict(options))
    config.dtype = torch.bfloat16
    config.save_pretrained(origin)
    GenerationConfig.from_model_config(config).save_pretrained(origin)
    return options


@contextmanager
def _silent() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class GgufReader:
    """Lazy access to the tensors of a GGUF file by their names in an ordinary checkpoint, in float32.

    Experts that the file stacks are one tensor each. Tensors that the model has no place for are left out, as
    transformers does.

    Args:
        file: The file.
        model: The model that it holds, on the meta device.
        options: Of the model's config, as transformers reads them from the file.

    Raises:
        CheckpointError: If the file's tensors do not fit the model.
    """

    def __init__(self, file: GgufFile, model: PreTrainedModel, options: dict[str, Any]) -> None:
        self._gguf = file
        self._layout: _Layout = (
            _Converted(file.architecture, model)
            if file.architecture in GGUF_ARCHS
            else _Processed(file.architecture, model, options)
        )
        self._sources: dict[str, tuple[str, int | None]] = {}  # name -> tensor in the file, expert in it
        self._shapes: dict[str, tuple[int, ...]] = {}
        state = model.state_dict()
        for source in file.tensors:
            experts = _EXPERTS.fullmatch(source)
            target = self._layout.target(experts["key"] if experts else source)
            held = {target: state[target]} if target in state else {}
            stored = revert_weight_conversion(model, held) if held else {}  # as an ordinary checkpoint has it
            if experts:
                self._add_experts(source, experts["part"], stored)
            elif stored:
                ((name, tensor),) = stored.items()
                self._add(name, source, None, tuple(tensor.shape))

    def _add_experts(self, source: str, part: str, stored: dict[str, torch.Tensor]) -> None:
        pattern = re.compile(rf".*\.experts\.(\d+)\.({'|'.join(_EXPERT_PARTS[part])})\.weight")
        experts = {int(match[1]): name for name in stored if (match := pattern.fullmatch(name))}
        count = self._gguf.tensors[source].shape[0]
        if sorted(experts) != list(range(count)):
            raise CheckpointError(
                f"{self._gguf.path}: {source} stacks {count} experts, and the model that transformers makes of this "
                f"file stores {len(experts)}; use the model's safetensors"
            )
        for index, name in experts.items():
            self._add(name, source, index, tuple(stored[name].shape))

    def _add(self, name: str, source: str, expert: int | None, shape: tuple[int, ...]) -> None:
        stored = self._gguf.tensors[source].shape
        stored = stored if expert is None else stored[1:]
        if prod(stored) != prod(shape):
            raise CheckpointError(
                f"{self._gguf.path}: {source} has shape {stored}, but the file's metadata make it {shape}; the file is "
                "damaged, or of a kind that transformers does not know"
            )
        self._sources[name], self._shapes[name] = (source, expert), shape

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass  # the file is unmapped with the last array of it

    def names(self) -> list[str]:
        """Return the names of all tensors, in the file's order."""
        return list(self._sources)

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        self._source(name)
        return self._gguf.path

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        self._source(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype: float32, which loses nothing of any ggml type."""
        self._source(name)
        return torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, dequantized, on the CPU."""
        source, expert = self._source(name)
        values = self._gguf.values(source, expert)
        if expert is None:
            values = self._layout.undo(source, values)
        if values.shape != self._shapes[name]:
            raise CheckpointError(
                f"{self._gguf.path}: {source} becomes {values.shape}, but the file's metadata make it "
                f"{self._shapes[name]}; the file is damaged, or of a kind that transformers does not know"
            )
        return torch.from_numpy(np.ascontiguousarray(values))

    def _source(self, name: str) -> tuple[str, int | None]:
        if name not in self._sources:
            raise CheckpointError(f"{self._gguf.path}: no tensor {name!r}")
        return self._sources[name]


class _Layout(Protocol):
    """How llama.cpp's tensors become a model's."""

    def target(self, source: str) -> str | None:
        """Return the name in the model of a tensor in the file."""

    def undo(self, source: str, values: _Values) -> _Values:
        """Return the model's values from the file's."""


class _Processed:
    """Most architectures: a map of names, and a tensor processor that undoes permutations, transposes and offsets."""

    def __init__(self, architecture: str, model: PreTrainedModel, options: dict[str, Any]) -> None:
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=options)
        self._names = gguf_names(model, self._processor)

    def target(self, source: str) -> str | None:
        return self._names.get(source)

    def undo(self, source: str, values: _Values) -> _Values:
        return np.asarray(gguf_values(self._processor, source, values, self._names))


class _Converted:
    """The newer architectures: renamings, and converters of one tensor each. Experts are not among them."""

    def __init__(self, architecture: str, model: PreTrainedModel) -> None:
        mapping = get_gguf_conversion_mapping(architecture, model.config)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def _locate(self, source: str) -> tuple[str, str | None]:
        return rename_source_key(source, self._renamings, self._converters)

    def target(self, source: str) -> str | None:
        return self._locate(source)[0]

    def undo(self, source: str, values: _Values) -> _Values:
        target, pattern = self._locate(source)
        if pattern is None:
            return values
        return converted(self._converters, pattern, torch.from_numpy(values), target).numpy()
