"""How do trained parameters and bits of the base grow with the rank, on a 7B's shapes, and what is gained? LoRA beside.

    python benchmarks/growth.py --spectrum-of gemma-3-270m.Q4_K_M.gguf --output benchmarks/results/growth.json

The paper says that OSoRA's parameters grow by one a layer where LoRA's grow by the sum of its sides. Here PEFT counts
both on the meta device, and the base's bytes are those of its tensors as they are stored: nothing is trained.

Matrices of the large model's shapes are drawn with the singular values of a small real one, and stored: the relative
errors are those of the weights. Each of the small model's singular values stands for as many of the large
one's as its matrices are larger, so a rank is a smaller part of them; singular vectors are random, so that no column or
row is larger than others, and scaling columns gains nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Record, arguments
from gsm8k import load_source
from methods import MINIATURE, shape_config
from peft import LoraConfig, get_peft_model

from qosora import OsoraConfig, QosoraConfig
from qosora.base import decompose_structure
from qosora.decompose import factorize_with_report
from qosora.layers import qosora_modules
from qosora.memory import StepOptions, meta_model

QUESTION = "How do trained parameters and bits of the base grow with the rank, and what is gained?"
#: The matrices that are drawn.
DRAWN = ("q_proj", "down_proj")


def trained(model: Any) -> int:
    """Count what PEFT trains."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def counted(shape: str, rank: int) -> dict[str, Any]:
    """Count both methods at a rank."""
    lora = get_peft_model(
        meta_model(shape_config(shape), StepOptions()), LoraConfig(r=rank, target_modules="all-linear")
    )
    model = meta_model(shape_config(shape), StepOptions())
    decompose_structure(model, QosoraConfig(rank=rank), stacks=True)
    layers = qosora_modules(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(t.numel() * t.element_size() for layer in layers for t in layer.state_dict().values())
    return {
        "layers": len(layers),
        "osora": trained(get_peft_model(model, OsoraConfig())),
        "lora": trained(lora),
        "bits_per_weight": 8 * stored / weights,
    }


def drawn(shape: str, source: Path) -> dict[str, torch.Tensor]:
    """Draw matrices of a large model's shapes with the singular values of a small one's middle layer.

    Args:
        shape: Of the large model.
        source: GGUF file or folder of the small one.

    Returns:
        float32, of a norm of 1, by the end of the layer's name.
    """
    large = meta_model(shape_config(shape), StepOptions())
    small: Any = load_source(source)[1]
    middle = f".{small.config.num_hidden_layers // 2}."
    generator = torch.Generator().manual_seed(0)
    found = {}
    for end in DRAWN:
        values = next(
            torch.linalg.svdvals(module.weight.detach())
            for name, module in small.named_modules()
            if name.endswith(end) and middle in name
        )
        rows, columns = next(module.weight.shape for name, module in large.named_modules() if name.endswith(end))
        stretched = F.interpolate(values[None, None], min(rows, columns), mode="linear")[0, 0]
        left, right = (
            torch.linalg.qr(torch.randn(side, len(stretched), generator=generator))[0] for side in (rows, columns)
        )
        found[end] = (left * (stretched / stretched.norm())) @ right.T
    return found


def errors(weights: dict[str, torch.Tensor], ranks: list[int]) -> dict[str, Any]:
    """Decompose matrices at each rank; give by matrix and rank what `ErrorReport` has, and NF4 in blocks of 32."""

    def report(weight: torch.Tensor, rank: int, **options: Any) -> dict[str, float]:
        return asdict(factorize_with_report(weight, rank, **options)[1])

    return {
        "ranks": {name: {str(rank): report(W, rank) for rank in ranks} for name, W in weights.items()},
        "blocks_of_32": {name: report(W, min(ranks), blocksize=32) for name, W in weights.items()},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", default="llama-2-7b", metavar="SHAPE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--spectrum-of", type=Path, metavar="MODEL", help="small real one, a GGUF file or a folder")
    tiny = Path(__file__).parent.parent / "qosora" / "demo" / "assets" / "model"
    args = arguments(parser, model=MINIATURE, ranks=[4, 8], spectrum_of=tiny)
    if not args.spectrum_of:
        parser.error("--spectrum-of is required")
    config = {"model": args.model, "spectrum_of": args.spectrum_of.stem}
    record = Record(args.output, "growth", QUESTION, config, args.resume)
    for rank in args.ranks:
        record.stage(str(rank), partial(counted, args.model, rank))
    record.stage("errors", lambda: errors(drawn(args.model, args.spectrum_of), args.ranks))


if __name__ == "__main__":
    main()
