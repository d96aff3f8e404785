"""How large a model's activations are, channel by channel: what `scale="calibrated"` is made from.

The model runs over some text without ever being in memory: accelerate fetches each module's weights from the checkpoint
when it is called, and lets them go. Activations of a few thousand tokens and one module's weights are all there is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qosora.base.layout import PlainModel, take_stacks_apart
from qosora.base.load import load_tokenizer
from qosora.checkpoints import SourceCheckpoint, empty_model, load_config
from qosora.compat.torch import TorchDispatchMode, tree_iter
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError, first_line
from qosora.formats import BASE
from qosora.layers import fast_dtype, split_experts, weights_read

__all__ = ["AllThere", "calibration_rows", "rows_digest", "second_moments", "streamed_model", "token_rows"]

#: Tokens that are used, in rows of one length, and the rows that are run at once.
TOKENS, LENGTH, ROWS = 4096, 512, 4
#: An expert's moments count as much as the mean of all experts' when it got this many tokens.
PRIOR_TOKENS = 64
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")

logger = logging.getLogger("qosora")


def calibration_rows(config: QosoraConfig, origin: Path, trust_remote_code: bool = False) -> torch.Tensor:
    """Return the first tokens of `config.calibration`, texts one after the other, in rows of one length.

    Args:
        config: With scale "calibrated".
        origin: Folder with the model's tokenizer.
        trust_remote_code: Whether to run a tokenizer's code that is there.

    Returns:
        (rows, length), int64: at most `TOKENS` tokens, in rows of `LENGTH` if there are enough for one.

    Raises:
        ConfigError: If there are no texts, or no tokens in them.
        CheckpointError: If there is no tokenizer.
    """
    if not config.calibration:
        raise ConfigError("scale='calibrated' is made from text: give calibration=[...], or --calibration FILE")
    return token_rows(config.calibration, origin, trust_remote_code)


def token_rows(texts: Sequence[Any], origin: Path, trust_remote_code: bool = False) -> torch.Tensor:
    """Do as `calibration_rows` with texts, or lists of token ids."""
    tokens: list[int] = []
    in_words = len(texts) > 0 and isinstance(texts[0], str)
    tokenizer = load_tokenizer(origin, trust_remote_code=trust_remote_code) if in_words else None
    for text in texts:
        tokens += text if tokenizer is None else tokenizer(text)["input_ids"]
        if len(tokens) >= TOKENS:
            break
    if not tokens:
        raise ConfigError("there is no token in the texts of the calibration or check")
    length = min(LENGTH, len(tokens))
    count = min(len(tokens), TOKENS) // length * length
    return torch.tensor(tokens[:count]).view(-1, length)


def rows_digest(rows: torch.Tensor) -> str:
    """Return the SHA-256 of rows of tokens."""
    return hashlib.sha256(json.dumps(rows.tolist()).encode()).hexdigest()


def second_moments(
    checkpoint: SourceCheckpoint,
    rows: torch.Tensor,
    names: Sequence[str],
    *,
    device: torch.device,
    file: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, torch.Tensor]:
    """Return E[x²] of the inputs of linear layers, over the tokens of some text, computed by the original model.

    Experts that got few tokens are drawn towards the mean of all experts.

    Args:
        checkpoint: Of a causal language model.
        rows: Tokens, (rows, length).
        names: Of the layers.
        device: Where to compute.
        file: Where to keep what has been measured: a call that was interrupted goes on from it.
        trust_remote_code: Whether to run model code that the checkpoint brings.

    Returns:
        (in_features,) float32 each, by name.

    Raises:
        CheckpointError: If the model cannot be run so.
    """
    totals = _Totals(file, rows)
    batches = torch.split(rows, ROWS)
    if totals.batches < len(batches):
        model = streamed_model(checkpoint, device, trust_remote_code)
        logger.info("measuring activations on %d tokens", rows.numel())
        with totals.gathered(model, names):
            for batch in batches[totals.batches :]:
                try:
                    with torch.inference_mode(), AllThere():
                        model.base_model(input_ids=batch.to(device), use_cache=False)
                except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                    raise CheckpointError(
                        f"{checkpoint.origin}: {type(model).__name__} cannot be calibrated, as it does not run with "
                        f"one module's weights at a time ({first_line(error)}); use scale='columns'"
                    ) from error
                totals.finish_batch()
    return totals.means(names)


def streamed_model(
    checkpoint: SourceCheckpoint, device: torch.device, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the original model, whose modules have their weights only while they run; by default in 16 bits."""
    plain = PlainModel(checkpoint.origin, trust_remote_code, stacks=BASE)
    config = load_config(checkpoint.origin, trust_remote_code=trust_remote_code)
    stored = torch.bfloat16 if config.dtype in (None, torch.float32) else config.dtype
    config.dtype = dtype or (stored if device.type != "cpu" else fast_dtype(stored))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = empty_model(config, trust_remote_code).eval()
    split_experts(model)
    take_stacks_apart(model)
    weights = _Weights(checkpoint, plain)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    model = cpu_offload(model, device, state_dict=weights)
    for reader, paths in weights_read(model, devices=True).items():
        _keep_while_running(model, reader, paths, weights, device)
    return model


def _keep_while_running(
    model: nn.Module, reader: str, paths: set[str], weights: _Weights, device: torch.device
) -> None:
    """Let modules have their weights as long as one runs that reads them: it may call them besides, or not."""
    names = [f"{path}.{key}" for path in paths for key, _ in model.get_submodule(path).named_parameters(recurse=False)]
    running = [False]

    def place(*_: Any) -> None:
        for name in names if running[0] else ():
            set_module_tensor_to_device(model, name, device, value=weights[name])

    def begin(*_: Any) -> None:
        running[0] = True
        place()

    def end(*_: Any) -> None:
        running[0] = False
        for name in names:
            set_module_tensor_to_device(model, name, "meta")

    module = model.get_submodule(reader)
    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)
    for path in paths:
        model.get_submodule(path).register_forward_hook(place)


class AllThere(TorchDispatchMode):
    """Refuses to compute with a weight that is not there: `F.linear` does, and returns what lay in memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation whose tensors are all on the meta device, or none."""
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            raise RuntimeError(f"{func} uses a weight whose module is not called")
        return func(*args, **(kwargs or {}))


class _Weights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, by their names in the model, read when asked for."""

    def __init__(self, checkpoint: SourceCheckpoint, plain: PlainModel) -> None:
        self._reader = plain.apart(checkpoint.reader)
        self._disk: dict[str, str] = {}
        for disk in self._reader.names():
            name, parts = plain.locate(disk)
            if parts == [name]:
                self._disk[name] = disk
        for name in plain.shapes:
            if name not in self._disk and (other := next(filter(self._disk.get, plain.tied_to(name)), None)):
                self._disk[name] = self._disk[other]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader.tensor(self._disk[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._disk)

    def __len__(self) -> int:
        return len(self._disk)


class _Totals:
    """Sums of squares over tokens, float64, and numbers of tokens, by layer; with a file, kept batch by batch."""

    def __init__(self, file: Path | None, rows: torch.Tensor) -> None:
        self.file, self.digest = file, rows_digest(rows)
        self.batches = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as found:
                kept = json.loads(found.metadata()["state"])
                if kept["digest"] == self.digest:
                    self.batches, self.counts = kept["batches"], kept["counts"]
                    self.sums = {name: found.get_tensor(name) for name in self.counts}
        except (SafetensorError, KeyError, TypeError, ValueError):  # torn: measured anew
            self.batches, self.sums, self.counts = 0, {}, {}

    @contextmanager
    def gathered(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Add up the inputs of layers while in the context."""
        hooks = [model.get_submodule(name).register_forward_pre_hook(self._adding(name)) for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adding(self, name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            squares = x.square().sum(0, dtype=torch.float64).cpu()
            self.sums[name] = self.sums.get(name, 0) + squares
            self.counts[name] = self.counts.get(name, 0) + len(x)

        return add

    def finish_batch(self) -> None:
        """Count a batch, and keep what there is."""
        self.batches += 1
        if self.file is not None:
            state = {"digest": self.digest, "batches": self.batches, "counts": self.counts}
            temporary = self.file.with_name(f".{self.file.name}.tmp")
            save_file(self.sums, temporary, metadata={"state": json.dumps(state)})
            temporary.replace(self.file)

    def means(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the mean squares; those of experts drawn towards their mean over all experts."""
        pooled: dict[str, tuple[Any, int]] = {}
        for name in names:
            if (kind := _kind(name)) is not None:
                total, count = pooled.get(kind, (0, 0))
                pooled[kind] = (total + self.sums.get(name, 0), count + self.counts.get(name, 0))
        found = {}
        for name in names:
            total, count = self.sums.get(name, torch.zeros(())), self.counts.get(name, 0)
            if (kind := _kind(name)) is not None and pooled[kind][1]:
                shared, tokens = pooled[kind]
                total, count = total + shared * (PRIOR_TOKENS / tokens), count + PRIOR_TOKENS
            if not count:
                raise CheckpointError(
                    f"{name} was not run on any token, so it cannot be calibrated; use scale='columns'"
                )
            found[name] = (total / count).float()
            if not found[name].isfinite().all():
                raise CheckpointError(f"{name}: its inputs are NaN or infinite on the calibration text")
        return found


def _kind(name: str) -> str | None:
    """Return which projection of which experts a layer is, or None if it is no expert's."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else f"{match[1]}.{match[2]}"
