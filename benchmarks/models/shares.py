"""What part of a mixture's matrices is decomposed, in the shapes of its configuration class, not of a tiny model?

    python benchmarks/models/shares.py --output benchmarks/results/shares.json

On the meta device, as the planner has it. Of a tiny model convolutions, routers and tables of positions are a large
part of all entries, so `run_models.py` can say of each architecture only that its experts are decomposed.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from functools import partial
from typing import Any

import torch
from run_models import left, share
from tiny_models import architectures
from transformers import AutoConfig

from qosora.base import decompose_structure
from qosora.checkpoints import empty_model
from qosora.config import QosoraConfig
from qosora.layers import qosora_modules

from common import Record, arguments  # isort: skip  (run_models.py has made it known)

QUESTION = "What part of a mixture's matrices is decomposed?"
MODELS = (
    "causal/gpt_oss", "causal/dbrx", "causal/granitemoe", "causal/granitemoehybrid", "causal/llama4_text",
    "causal/jetmoe", "causal/longcat_flash", "vision/aria", "causal/phi4_multimodal", "vision/minimax_m3_vl",
    "causal/inkling_text", "causal/inkling2_text", "causal/zamba",
)  # fmt: skip
#: The published shapes where the class defaults to small ones.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
}  # fmt: skip


def counted(name: str) -> dict[str, Any]:
    """Decompose a model without weights, and count."""
    kind, model_type = name.split("/")
    config = AutoConfig.for_model(model_type, **PUBLISHED.get(model_type, {}))
    config.architectures = [dict(architectures(kind))[model_type]]
    with torch.device("meta"):
        model = empty_model(config, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    decompose_structure(model, QosoraConfig(), stacks=True)
    kinds: Counter[str] = Counter()
    for path, count in left(model).items():
        kinds[re.sub(r"\.\d+(?=\.)", ".*", path)] += count
    return {
        "class": type(model).__name__,
        "parameters": parameters,
        "share": share(model),
        "layers": len(qosora_modules(model)),
        "left": dict(kinds.most_common(5)),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--only", nargs="+", default=list(MODELS), metavar="KIND/TYPE")
    args = arguments(parser, only=["causal/jetmoe"])
    record = Record(args.output, "shares", QUESTION, {}, args.resume)
    for name in args.only:
        record.stage(name, partial(counted, name))


if __name__ == "__main__":
    main()
