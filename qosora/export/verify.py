"""Does an export compute what the adapted model computes? Logits of both, the export's from a program without qosora.

The reference is the base in 4 bits with its adapters, as qosora runs it. For an export onto the original model, each
of its layers also gets (W0 - W_base) x, with W0 read from the original when the layer's turn comes, so that it is the
original model plus what was learned, and no 16-bit model is in memory.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig

from qosora.adapter import OsoraLayer
from qosora.base import fit_vocabulary, load_base, load_tokenizer
from qosora.checkpoints import has_tokenizer, model_class_of, task_of
from qosora.errors import CheckpointError
from qosora.export import outsider
from qosora.export.original import Original
from qosora.export.stored import AdaptedBase, Layer
from qosora.layers import QosoraLinear, VocabularyMatrix, layers_on_disk, plain_vocabulary

__all__ = ["TEXTS", "TOKENS", "Reference", "Verification", "logits_elsewhere", "padded", "verify_export"]

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Question: Natalia sold 48 clips in April and half as many in May. How many did she sell? Answer: 48 + 24 = 72.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
)
#: Tokens of a text that are used, and of a random one where there is no tokenizer.
TOKENS = 64
#: Of sound, where a model takes that as it is.
_SAMPLES = 8000
#: Largest relative difference of logits, by the dtype of the export's weights. Rounding a weight to bfloat16 or float16
#: changes it by at most its unit roundoff, 2^-8 or 2^-11, at random, and a layer's output by a third of that; the
#: layers' changes add up like the square root of their number and grow on the way: together 1 to 4 roundoffs in the
#: dense models that were tried, 16 where they sent tokens to other experts. Float32 leaves the order of sums, 2^-20.
_TOLERANCES = {torch.float32: 2**-13, torch.float16: 2**-11 * 32, torch.bfloat16: 2**-8 * 32}


@dataclass(frozen=True)
class Verification:
    """How far an export's logits are from the adapted model's, in float32, over the tokens of a few texts.

    Attributes:
        reference: What the export is compared with.
        tokens: Number of them.
        largest_difference: Of any logit.
        mean_difference: Of all logits.
        relative_difference: Root mean square of the differences over that of the logits, their mean subtracted.
        tolerance: That the relative difference must not exceed.
        equal_top_tokens: Part of the tokens whose likeliest successor is the same.
    """

    reference: str
    tokens: int
    largest_difference: float
    mean_difference: float
    relative_difference: float
    tolerance: float
    equal_top_tokens: float


class Reference:
    """The adapted model that an export stands for.

    Args:
        adapted: Base and adapters.
        original: The original model, where the export is onto that.
        trust_remote_code: Whether to run model code that the base brings.
    """

    def __init__(self, adapted: AdaptedBase, original: Original | None, trust_remote_code: bool) -> None:
        self.adapted, self.original, self.trust_remote_code = adapted, original, trust_remote_code

    @property
    def name(self) -> str:
        """What it is, in words."""
        start = "base in 4 bits" if self.original is None else "original model"
        return f"{start} with the adapter" if self.adapted.adapters else start

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what the model is run on, a row for each text: its tokens, or random ones without a tokenizer.

        They are padded on the right. A model that hears gets noise, and one that answers the first tokens of one.
        """
        folders = [*(adapter.folder for adapter in self.adapted.adapters), self.adapted.base]
        if folders := list(filter(has_tokenizer, folders)):
            tokenizer = load_tokenizer(*folders, trust_remote_code=self.trust_remote_code)
            rows = [tokenizer(text)["input_ids"][:TOKENS] for text in TEXTS]
        else:
            vocabulary = self.adapted.plain.model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            rows = [torch.randint(vocabulary, (TOKENS,), generator=generator).tolist() for _ in TEXTS]
            end = self.adapted.plain.model.config.eos_token_id
            rows = [
                [*row[:-1], end if isinstance(end, int) and 0 <= end < vocabulary else row[-1]] for row in rows
            ]  # classifiers may need it
        model: Any = self.adapted.plain.model
        given = tokens = padded(rows)
        if (name := model.main_input_name) in ("input_features", "input_values"):
            config, noise = model.config, torch.Generator().manual_seed(0)
            bins = (config.num_mel_bins, 2 * config.max_source_positions) if name == "input_features" else (_SAMPLES,)
            given = {name: torch.randn(len(rows), *bins, generator=noise)}
        if model.config.is_encoder_decoder and model.can_generate():
            given["decoder_input_ids"] = tokens["input_ids"][:, : min(map(len, rows))].clone()
        return given

    def logits(
        self, inputs: dict[str, torch.Tensor], dtype: torch.dtype, *, with_adapters: bool = True
    ) -> torch.Tensor:
        """Return the logits of the tokens, (tokens, vocabulary), with what is not decomposed in `dtype`."""
        model: Any = load_base(
            self.adapted.base, dtype=dtype, device_map="cpu", trust_remote_code=self.trust_remote_code
        )
        if self.adapted.adapters and with_adapters:
            model = self._adapted(model)
        if self.original is not None:
            self._add_what_quantization_lost(model, self.original)
        outsider.compute_in_float32(model)
        return outsider.logits(model, **inputs)

    def _adapted(self, model: nn.Module) -> nn.Module:
        """Load the adapters onto the base; a combination's vectors take the place of the base's."""
        folders = [str(adapter.folder) for adapter in self.adapted.adapters]
        fit_vocabulary(model, folders[0])
        adapted = PeftModel.from_pretrained(model, folders[0], "0")
        if self.adapted.weights == [1.0]:
            return adapted
        for i, folder in enumerate(folders[1:], 1):
            adapted.load_adapter(folder, str(i))
        for layer in adapted.modules():
            if isinstance(layer, OsoraLayer):
                for k, base in enumerate(layer.base_vectors):
                    parts = [w * (layer.vectors(str(i))[k] - base) for i, w in enumerate(self.adapted.weights)]
                    base.data = base + torch.stack(parts).sum(0)
        plain: nn.Module = adapted.unload()
        for name, module in plain.named_modules():
            if name in self.adapted.updates and isinstance(module, QosoraLinear):
                B, A = self.adapted.updates[name]
                module.register_forward_hook(partial(_add_update, B, A))
        return plain

    def _add_what_quantization_lost(self, model: nn.Module, original: Original) -> None:
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        names = [name for name, module in layers_on_disk(causal).items() if isinstance(module, VocabularyMatrix)]
        plain_vocabulary(causal, causal.dtype)
        for name in names:
            causal.get_parameter(f"{name}.weight").data.copy_(original.named(f"{name}.weight"))
        for name, module in causal.named_modules():
            if isinstance(module, (OsoraLayer, QosoraLinear)) and name in self.adapted.layers:
                base = module.base_layer if isinstance(module, OsoraLayer) else module
                module.register_forward_hook(self._addition(self.adapted.layers[name], base, original))

    def _addition(self, layer: Layer, base: QosoraLinear, original: Original) -> Callable[..., torch.Tensor]:
        sigma, ones = self.adapted.base_vectors[layer.module]

        def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            lost = original.weight(layer).float() - base.dequantize(sigma, ones)
            return output + F.linear(args[0].float(), lost).to(output.dtype)

        return add


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return rows of tokens padded on the right, (rows, longest), and the mask of what are tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _add_update(
    B: torch.Tensor, A: torch.Tensor, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    return output + F.linear(F.linear(args[0].float(), A), B).to(output.dtype)


def verify_export(
    folder: Path,
    reference: Reference,
    dtype: torch.dtype,
    *,
    model: str | None = None,
    rank_error: float = 0.0,
) -> Verification:
    """Compare an export with what it stands for.

    Args:
        folder: Of the export: a checkpoint, or a LoRA.
        reference: What it stands for.
        dtype: Of the export's weights.
        model: Of a LoRA: the checkpoint to load it onto.
        rank_error: Of a LoRA: the part of ΔW that it does not have, as its rank was reduced.

    Raises:
        CheckpointError: If it does not load, or gives other logits.
    """
    inputs = reference.inputs()
    # Of a LoRA, what it does not adapt comes from the original.
    plain_dtype = dtype if model is None else reference.adapted.dtype
    expected = reference.logits(inputs, plain_dtype)
    learned = expected - reference.logits(inputs, plain_dtype, with_adapters=False) if rank_error else None
    gc.collect()
    got = logits_elsewhere(folder, model, inputs, reference.trust_remote_code, reference.adapted.plain.model.config)
    difference = (got - expected).abs()
    several = expected.shape[-1] > 1  # of which a common shift says nothing; of a reward it does
    size = torch.linalg.vector_norm(expected - expected.mean(-1, keepdim=True) * several)
    tolerance = _TOLERANCES[dtype]
    if reference.original is not None:  # what is not decomposed is in the base's dtype in the reference only
        tolerance = max(tolerance, _TOLERANCES[reference.adapted.dtype])
    if learned is not None:
        tolerance += 2 * rank_error * float(torch.linalg.vector_norm(learned) / size)
    found = Verification(
        reference=reference.name,
        tokens=len(expected),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        relative_difference=float(torch.linalg.vector_norm(difference) / size),
        tolerance=tolerance,
        equal_top_tokens=float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
    )
    if not found.relative_difference <= tolerance:
        raise CheckpointError(
            f"the export's logits differ from those of the {found.reference} by {found.relative_difference:.3g} of "
            f"their size; rounding to {str(dtype).removeprefix('torch.')} makes at most {tolerance:.3g}. Nothing of "
            "the export is kept"
        )
    return found


def logits_elsewhere(
    folder: Path,
    model: str | None,
    inputs: dict[str, torch.Tensor],
    trust_remote_code: bool,
    config: PreTrainedConfig | None = None,
) -> torch.Tensor:
    """Return an export's logits, (tokens, vocabulary), from a program that cannot import qosora.

    Args:
        folder: Of the export: a checkpoint, or a LoRA.
        model: Of a LoRA: the checkpoint to load it onto.
        inputs: To both.
        trust_remote_code: Whether to run model code that the checkpoint brings.
        config: Of a LoRA: the base's, which may have another head than the checkpoint.
    """
    adapter = [] if model is None else ["--adapter", str(folder)]
    code = ["--trust-remote-code"] if trust_remote_code else []
    if model is not None and config is not None and task_of(config) is not None:
        adapter += ["--kind", model_class_of(config).__name__, "--labels", str(config.num_labels)]
    with TemporaryDirectory(prefix="qosora-") as scratch:
        files = [str(Path(scratch) / name) for name in ("inputs.safetensors", "logits.safetensors")]
        save_file(inputs, files[0])
        done = subprocess.run(
            [sys.executable, "-I", outsider.__file__, model or str(folder), *files, *adapter, *code],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise CheckpointError(f"the export does not load where qosora cannot be imported: {lines[-1]}")
        return load_file(files[1])["logits"]
