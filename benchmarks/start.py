"""How far is an untrained base from the unquantized model? KL divergence of their next tokens, NF4 beside.

    python benchmarks/start.py --model gemma-3-270m.Q4_K_M.gguf --data-dir gsm8k --output results.json

KL(p ‖ q) of the distributions of the next token, p by the unquantized model and q by the other, in nats, averaged over
all positions of some questions and answers of GSM8K's test set; everything is computed in float32. The vocabulary is
cut to these texts' tokens (see vocabulary.py). Bits per weight count all that is stored of the decomposed layers, but
for `o`, which is ones.
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
from qosora.decompose import nf4
from qosora.layers import qosora_modules

QUESTION = "How far is an untrained base from the unquantized model?"


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

    def compare(self, model: PreTrainedModel) -> dict[str, float]:
        """Return how far a model is from the unquantized one."""
        got = log_probabilities(model, self.ids, self.mask)
        kl = (self.expected.exp() * (self.expected - got)).sum(-1).mean()
        equal = (self.expected.argmax(-1) == got.argmax(-1)).float().mean()
        return {"kl_divergence": round(float(kl), 4), "equal_top_tokens": round(float(equal), 4)}


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the next tokens' probabilities, (tokens, vocabulary)."""
    return F.log_softmax(model.eval()(input_ids=ids, attention_mask=mask.long()).logits[mask], -1)


def prepare(args: argparse.Namespace, folder: Path) -> Texts:
    """Write the unquantized model with its vocabulary cut; return the texts with what it expects."""
    tokenizer, model = load_source(Path(args.model))
    lines = (Path(args.data_dir) / "test.jsonl").read_text(encoding="utf-8").splitlines()[: args.texts]
    texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    tokenizer, kept = cut_tokenizer(tokenizer, texts)
    cut_model(model, kept)
    model.save_pretrained(folder)
    rows = [ids[: args.tokens] for ids in tokenizer(texts)["input_ids"]]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return Texts(ids, mask, log_probabilities(model, ids, mask))


def start_of_nf4(folder: Path, texts: Texts) -> dict[str, float]:
    """Quantize the weights as they are, as QLoRA does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = numel = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            q = nf4.quantize(module.weight.data)
            stored, numel = stored + q.nbytes, numel + module.weight.numel()
            module.weight.data = nf4.dequantize(q)
    return {**texts.compare(model), "bits_per_weight": round(8 * stored / numel, 3)}


def start_of_base(folder: Path, texts: Texts, rank: int, scale: str | None) -> dict[str, float]:
    """Decompose the weights."""
    config = QosoraConfig(rank=rank, scale=scale)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    layers = qosora_modules(model).values()
    stored = sum(layer.factors.nbytes for layer in layers)
    numel = sum(layer.in_features * layer.out_features for layer in layers)
    return {**texts.compare(model), "bits_per_weight": round(8 * stored / numel, 3)}


def stages(args: argparse.Namespace, folder: Path, texts: Texts) -> Mapping[str, Callable[[], dict[str, float]]]:
    """Return what is compared, by name."""
    return {"nf4": partial(start_of_nf4, folder, texts)} | {
        f"qosora_r{rank}{f'_{scale}' if scale else ''}": partial(start_of_base, folder, texts, rank, scale)
        for rank in args.ranks
        for scale in (None, "columns")
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", required=True, help="GGUF file or model folder")
    parser.add_argument("--model-name", help="what the results call it (default: its file name)")
    parser.add_argument("--data-dir", required=True, help="folder with GSM8K's test.jsonl")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--resume", action="store_true", help="keep the stages that the output holds")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96, help="of each text, at most")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128])
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse()
    hidden = ("model", "model_name", "data_dir", "output", "resume")
    config: dict[str, Any] = {"model": args.model_name or Path(args.model).name, "data": "GSM8K"}
    config |= {name: value for name, value in vars(args).items() if name not in hidden}
    record = Record(args.output, "start", QUESTION, config, args.resume)
    with tempfile.TemporaryDirectory() as folder:
        texts = prepare(args, Path(folder))
        for name, action in stages(args, Path(folder), texts).items():
            record.stage(name, action)


if __name__ == "__main__":
    main()
