"""Do several processes train what one does, and what does each hold? All ways of dividing a run, on CPUs.

    python benchmarks/processes.py --output benchmarks/results/processes.json

A random model of Llama's kind is converted and trained in one process, and, with the same examples in every step, in
two and three, with the base whole in each (ddp), divided (fsdp), and in host memory: from examples (sft) and from pairs
of answers (dpo, orpo). orpo's loss is a mean over the tokens of a process's batch, so it differs; what kto and grpo
learn from depends on who is in it, so they are not here. Each result has the largest difference of a trained vector to
that of one process, relative to the vector's largest entry; the bytes of the frozen base that a process holds; the
largest resident set of a process; the seconds of the run.
Seconds on a CPU with as many cores as processes, or fewer, say nothing of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import Record, arguments
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qosora import QosoraConfig, TrainConfig, quantize, train
from qosora.demo import assets
from qosora.training import Processes
from qosora.training.trainer import TRAINERS

QUESTION = "Do several processes train what one does, and what does each of them hold?"
WAYS = {"ddp": {}, "fsdp": {"strategy": "fsdp"}, "host": {"strategy": "fsdp", "base_on": "host"}}
#: So large that AdamW's steps are not the signs of gradients that are all but zero.
EPSILON = 1e-3


def work(options: dict[str, Any]) -> None:
    """Train, as one of the processes, and write what of the base it held when it had trained."""
    base_bytes = 0

    kind: Any = TRAINERS[options["method"]]

    class Measured(kind):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal base_bytes
            result = super().train(*args, **kwargs)
            frozen = (p.detach() for p in self.model.parameters() if not p.requires_grad)
            base_bytes = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in frozen)
            return result

    with patch.dict(TRAINERS, {options["method"]: Measured}):
        result = train(TrainConfig(**options))
    processes = Processes.here()
    held = processes.gathered(base_bytes)
    if processes.main:
        found = {"base_bytes": held, "peak_rss_bytes": result.peak_memory_bytes, "seconds": result.wall_seconds}
        file = Path(options["output_dir"]) / "held.json"
        file.write_text(json.dumps(found), encoding="utf-8")
    Processes.leave()


def launch(count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train in some processes; return what they held, and the trained vectors."""
    launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *launcher, __file__, "--work", json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    folder = Path(options["output_dir"])
    held: dict[str, Any] = json.loads((folder / "held.json").read_text(encoding="utf-8"))
    return {**held, "vectors": load_file(folder / "adapter_model.safetensors")}


def make_base(folder: Path, tokenizer: Any, args: argparse.Namespace) -> Path:
    """Write a base of a random model for the demo's tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=2 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    quantize(folder / "model", folder / "base", QosoraConfig(rank=16))
    return folder / "base"


def preferences(source: Path, file: Path) -> Path:
    """Write the demo's examples with another's answer as the worse one."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:102]]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in pairwise(rows)
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file


def main() -> None:
    """Measure all ways."""
    if sys.argv[1] == "--work":
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="the model's hidden size")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3], help="of processes")
    parser.add_argument("--methods", nargs="+", default=["sft", "dpo", "orpo"], choices=("sft", "dpo", "orpo"))
    args = arguments(parser, width=64, layers=2, steps=2, counts=[2], methods=["sft", "dpo"])
    config = {name: getattr(args, name) for name in ("width", "layers", "steps", "counts", "methods")}
    record = Record(args.output, "processes", QUESTION, config, args.resume)
    with tempfile.TemporaryDirectory() as temporary, assets() as demo:
        folder = Path(temporary)
        base = make_base(folder, AutoTokenizer.from_pretrained(demo / "model"), args)
        pairs = preferences(demo / "train.jsonl", folder / "pairs.jsonl")
        options = {
            "model": str(base), "learning_rate": 1e-2,
            "max_steps": args.steps, "save_steps": 0, "progress": False, "precision": "fp32", "max_length": 128,
            "trl": {"adam_epsilon": EPSILON},
        }  # fmt: skip
        for method in args.methods:
            # Of pairs, accelerate fills an uneven last batch with others from the beginning: they would not be the same
            file, limit = (demo / "train.jsonl", 101) if method == "sft" else (pairs, 96)
            given = {**options, "method": method, "data": str(file), "limit": limit}
            for count in [1, *args.counts]:
                if all(f"{method}_{way}_{count}" in record.results() for way in ("ddp", "host")):
                    continue
                where = folder / f"{method}-{count}"
                whole = launch(1, {**given, "batch_size": 4 * count, "output_dir": str(where / "whole")})
                for way, more in WAYS.items():
                    if count == 1 and way == "fsdp":  # which is nothing else
                        continue
                    made = launch(count, {**given, **more, "batch_size": 4, "output_dir": str(where / way)})
                    vectors, expected = made.pop("vectors"), whole["vectors"]
                    difference = max(
                        float((vectors[name] - tensor).abs().max() / tensor.abs().max())
                        for name, tensor in expected.items()
                    )
                    record.stage(f"{method}_{way}_{count}", {**made, "difference": difference}.copy)


if __name__ == "__main__":
    main()
