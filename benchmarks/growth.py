"""How do trained parameters and bits of the base grow with the rank, on a 7B's shapes? LoRA beside.

    python benchmarks/growth.py --output benchmarks/results/growth.json

The paper says that OSoRA's parameters grow by one a layer where LoRA's grow by the sum of its sides. Here PEFT counts
both on the meta device, and the base's bytes are those of its tensors as they are stored: nothing is trained.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from common import Record, arguments
from methods import MINIATURE, shape_config
from peft import LoraConfig, get_peft_model

from qosora import OsoraConfig, QosoraConfig
from qosora.base import decompose_structure
from qosora.layers import qosora_modules
from qosora.memory import StepOptions, meta_model

QUESTION = "How do trained parameters and bits of the base grow with the rank?"


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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", default="llama-2-7b", metavar="SHAPE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512])
    args = arguments(parser, model=MINIATURE, ranks=[4, 8])
    record = Record(args.output, "growth", QUESTION, {"model": args.model}, args.resume)
    for rank in args.ranks:
        record.stage(str(rank), partial(counted, args.model, rank))


if __name__ == "__main__":
    main()
