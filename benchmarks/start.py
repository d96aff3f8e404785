"""How far is an untrained base from the unquantized model? KL divergence of their next tokens, rivals beside.

    python benchmarks/start.py --model gemma-3-270m.Q4_K_M.gguf --data-dir data --output results.json

KL(p ‖ q) of the distributions of the next token, p by the unquantized model and q by the other, in nats, averaged over
all positions of questions and answers of GSM8K's test set, and of questions of OpenBookQA's; everything is computed in
float32. Calibrated scales are made from OpenBookQA's training set. One draw of rounding errors moves the divergence by
some per cent, so each is measured for several: seeds of the SVD, and for what has none, blocks that begin elsewhere in
a row. The vocabulary is cut to these texts' tokens (see vocabulary.py). Bits per weight count all that is stored of the
decomposed layers, but for `o`, which is ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Record
from gsm8k import load_source
from transformers import AutoModelForCausalLM, PreTrainedModel
from vocabulary import cut_model, cut_tokenizer

from qosora.config import QosoraConfig
from qosora.decompose import EMBEDDINGS, SCALES, nf4, reconstruct
from qosora.decompose.factorize import factorize
from qosora.decompose.scales import column_scale
from qosora.layers import VocabularyMatrix, qosora_modules

QUESTION = "How far is an untrained base from the unquantized model?"


#: Quantiles of a normal distribution as NF4 has them (QLoRA, arXiv 2305.14314), 8 in place of 16.
NF3 = torch.tensor([-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819939, 0.6229857, 1])


@dataclass(frozen=True)
class Texts:
    """Tokens of some texts, and what the unquantized model expects after each.

    Args:
        ids: (texts, length), padded on the right.
        mask: Whether there is a token, (texts, length).
        expected: Logarithms of probabilities, (tokens, vocabulary).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    expected: torch.Tensor

    @classmethod
    def read(cls, rows: list[list[int]], model: PreTrainedModel) -> Texts:
        """Take texts as rows of tokens, and the unquantized model."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        return cls(ids, mask, log_probabilities(model, ids, mask))

    def compare(self, model: PreTrainedModel) -> tuple[float, float]:
        """Return a model's KL divergence, and how often its likeliest token is the unquantized one's."""
        got = log_probabilities(model, self.ids, self.mask)
        kl = (self.expected.exp() * (self.expected - got)).sum(-1).mean()
        equal = (self.expected.argmax(-1) == got.argmax(-1)).float().mean()
        return float(kl), float(equal)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the next tokens' probabilities, (tokens, vocabulary)."""
    return F.log_softmax(model.eval()(input_ids=ids, attention_mask=mask.long()).logits[mask], -1)


@dataclass(frozen=True)
class Start:
    """The unquantized model and what it is compared on.

    Args:
        folder: Of the model, its vocabulary cut.
        texts: By kind.
        calibration: Texts for calibrated scales.
        draws: Of rounding errors.
    """

    folder: Path
    texts: dict[str, Texts]
    calibration: list[str]
    draws: int

    def over_draws(self, made: Callable[[int], tuple[PreTrainedModel, float]]) -> dict[str, Any]:
        """Return divergences over draws, of what makes a model and says its bits per weight."""
        found: dict[str, Any] = {kind: {"kl_divergence": [], "equal_top_tokens": []} for kind in self.texts}
        for draw in range(self.draws):
            model, bits = made(draw)
            for kind, texts in self.texts.items():
                for key, value in zip(found[kind], texts.compare(model), strict=True):
                    found[kind][key].append(round(value, 4))
        return {**found, "bits_per_weight": round(bits, 3)}

    def plain(self, draw: int, **options: Any) -> tuple[PreTrainedModel, float]:
        """Quantize the weights to 4 bits as they are, as QLoRA does, or with a scale of columns."""
        scale = options.pop("scale", False)

        def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
            c = column_scale(weight) if scale else torch.ones(weight.shape[1])
            q = nf4.quantize((weight / c).roll(16 * draw, 1), **options)
            return nf4.dequantize(q).roll(-16 * draw, 1) * c, q.nbytes + (c.nbytes if scale else 0)

        return self._replaced(quantized)

    def int8(self, draw: int) -> tuple[PreTrainedModel, float]:
        """Quantize the weights to 8 bits, a scale for each row, as LLM.int8() does; a draw changes nothing."""

        def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
            scale = weight.abs().amax(1, keepdim=True) / 127
            return (weight / scale).round() * scale, weight.numel() + scale.nbytes

        return self._replaced(quantized)

    def _replaced(self, quantized: Callable[[torch.Tensor], tuple[torch.Tensor, int]]) -> tuple[PreTrainedModel, float]:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        stored = numel = 0
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                module.weight.data, nbytes = quantized(module.weight.data)
                stored, numel = stored + nbytes, numel + module.weight.numel()
        return model, 8 * stored / numel

    def base(
        self, draw: int, rank: int, scale: str | None, embeddings: str | None = None
    ) -> tuple[PreTrainedModel, float]:
        """Decompose the weights."""
        calibration = self.calibration if scale == "calibrated" else None
        config = QosoraConfig(rank=rank, scale=scale, calibration=calibration, seed=draw, embeddings=embeddings)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, quantization_config=config)
        layers = [layer for layer in qosora_modules(model).values() if not isinstance(layer, VocabularyMatrix)]
        stored = sum(layer.factors.nbytes for layer in layers)
        return model, 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)

    def three_bits(self, draw: int, rank: int) -> tuple[PreTrainedModel, float]:
        """Decompose the weights, with a residual of 3 bits a value: NF4's construction with 8 values, absmax exact."""

        def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
            factors = factorize(weight, rank, name="", seed=draw, scale="columns")
            assert factors.scale is not None
            kept = reconstruct(factors) - nf4.dequantize(factors.residual) * factors.scale
            blocks = ((weight - kept) / factors.scale).view(-1, 64)
            absmax = blocks.abs().amax(1, keepdim=True)
            nearest = (blocks[..., None] / absmax[..., None] - NF3).abs().argmin(-1)
            rest = (NF3[nearest] * absmax).view_as(weight) * factors.scale
            return kept + rest, factors.nbytes - weight.numel() // 8

        return self._replaced(quantized)

    def nf4_embeddings(self, draw: int, rank: int) -> tuple[PreTrainedModel, float]:
        """Decompose the weights, and quantize the embeddings as they are to NF4."""
        model, bits = self.base(draw, rank, "columns")
        weight = model.get_input_embeddings().weight.data
        weight.copy_(nf4.dequantize(nf4.quantize(weight.roll(16 * draw, 1))).roll(-16 * draw, 1))
        return model, bits


def prepare(args: argparse.Namespace, folder: Path) -> Start:
    """Write the unquantized model with its vocabulary cut; return it with the texts, and what it expects."""
    tokenizer, model = load_source(Path(args.model))
    data = Path(args.data_dir)
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[: args.texts]
    kinds = {"gsm8k": [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]}
    test, train = (
        json.loads((data / "openbookqa" / f"{s}.json").read_text(encoding="utf-8")) for s in ("test", "train")
    )
    kinds["openbookqa"] = [row["instruction"] for row in test[: args.texts]]
    calibration = [f"{row['instruction']}\n{row['output']}" for row in train[:128]]
    tokenizer, kept = cut_tokenizer(tokenizer, [text for texts in kinds.values() for text in texts] + calibration)
    cut_model(model, kept)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = {kind: [ids[: args.tokens] for ids in tokenizer(texts)["input_ids"]] for kind, texts in kinds.items()}
    return Start(folder, {kind: Texts.read(found, model) for kind, found in rows.items()}, calibration, args.draws)


def stages(args: argparse.Namespace, start: Start) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """Return what is compared, by name."""
    rivals: dict[str, Callable[[int], tuple[PreTrainedModel, float]]] = {
        "nf4": start.plain,
        "nf4_blocks_of_32": partial(start.plain, blocksize=32),
        "nf4_float32_absmax": partial(start.plain, double_quant=False),
        "nf4_columns": partial(start.plain, scale=True),
        "int8": start.int8,
    }
    rivals |= {
        f"qosora_r{rank}{f'_{scale}' if scale else ''}": partial(start.base, rank=rank, scale=scale)
        for rank in args.ranks
        for scale in (None, *SCALES)
    }
    rank = max(args.ranks)
    for kind in EMBEDDINGS:
        made = partial(start.base, rank=rank, scale="columns", embeddings=kind)
        rivals[f"qosora_r{rank}_columns_embeddings_{kind}"] = made
    for few in args.ranks:
        rivals[f"qosora_r{few}_columns_three_bits"] = partial(start.three_bits, rank=few)
    rivals[f"qosora_r{rank}_columns_embeddings_plain_nf4"] = partial(start.nf4_embeddings, rank=rank)
    return {name: partial(start.over_draws, made) for name, made in rivals.items() if name in (args.only or rivals)}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", required=True, help="GGUF file or model folder")
    parser.add_argument("--model-name", help="what the results call it (default: its file name)")
    parser.add_argument("--data-dir", required=True, help="folder with gsm8k/ and openbookqa/")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--resume", action="store_true", help="keep the stages that the output holds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="stages to run (default: all)")
    parser.add_argument("--texts", type=int, default=24, help="of each kind")
    parser.add_argument("--tokens", type=int, default=96, help="of each text, at most")
    parser.add_argument("--draws", type=int, default=3, help="of rounding errors")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128])
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse()
    hidden = ("model", "model_name", "data_dir", "output", "resume", "only")
    config: dict[str, Any] = {"model": args.model_name or Path(args.model).name, "data": "GSM8K, OpenBookQA"}
    config |= {name: value for name, value in vars(args).items() if name not in hidden}
    record = Record(args.output, "start", QUESTION, config, args.resume)
    with tempfile.TemporaryDirectory() as folder:
        for name, action in stages(args, prepare(args, Path(folder))).items():
            record.stage(name, action)


if __name__ == "__main__":
    main()
