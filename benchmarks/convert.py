"""How fast, and in how much memory, is a checkpoint converted?

Makes a checkpoint of Llama-2-7B's shapes (random weights with a decaying spectrum, bfloat16, 13.5 GB, sharded) and
converts it with `qosora quantize`. In the same run, on one decoder layer's weights and in turns: qosora, PEFT's
`pissa_niter_4` at the same rank, plain bitsandbytes NF4, and what the machine needs for the same work in theory: the
randomized SVD's floating-point operations as matrix products of the same shapes, plus the quantization.

    python benchmarks/convert.py --folder /big/disk

Where the disk is too small, layers are left out, and the result says how many there were. With a GPU all is computed
there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Record, seconds_of, watched
from transformers import AutoModelForCausalLM, LlamaConfig

from qosora.checkpoints import Shards, StoredSpec

RESULT = Path(__file__).parent / "results" / "convert_llama2_7b.json"
MINIATURE = "--miniature" in sys.argv
HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = (64, 128, 128, 2) if MINIATURE else (4096, 11008, 32000, 32)
#: Of one decoder layer: (out_features, in_features).
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "o")},
    **{f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ("qosora", "pissa_niter_4", "nf4", "theory")


def weight(out_features: int, in_features: int, seed: int) -> torch.Tensor:
    """Return a bfloat16 matrix whose leading singular values decay as k^-1/2 into a Gaussian bulk."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.randn(out_features, in_features, generator=generator) * 0.02
    left = torch.randn(out_features, 256, generator=generator) / out_features**0.5
    right = torch.randn(256, in_features, generator=generator) / in_features**0.5
    scale = 0.02 * (out_features**0.5 + in_features**0.5) * 2 / torch.arange(1, 257) ** 0.5
    return bulk.addmm_(left * scale, right).bfloat16()


def make_checkpoint(folder: Path, layers: int) -> dict[str, Any]:
    """Write the checkpoint, unless it is there; weights of later layers are the first's with rows' signs changed."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY, num_hidden_layers=layers,
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    specs = {name: StoredSpec.of(tensor) for name, tensor in model.state_dict().items()}
    shards = Shards(folder, specs, 5_000_000_000)
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shards.allocate()
        first = {name: weight(*shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
        generator = torch.Generator().manual_seed(1)
        for name, spec in specs.items():
            kind = name.partition("layers.")[2].partition(".")[2].removesuffix(".weight")
            if kind in first:
                signs = torch.randint(0, 2, (spec.shape[0], 1), generator=generator) * 2 - 1
                tensor = first[kind] * signs.bfloat16()
            else:
                tensor = torch.ones(spec.shape) if len(spec.shape) == 1 else torch.randn(spec.shape) * 0.02
            shards.write(name, tensor)
        shards.seal()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
    return {"layers": layers, "bytes": shards.total_bytes, "shards": shards.count}


def convert(folder: Path, rank: int) -> dict[str, Any]:
    """Convert the checkpoint by the command line."""
    output, report = folder / "base", folder / "report.json"
    command = [sys.executable, "-m", "qosora", "quantize", str(folder / "model"), str(output), "--rank", str(rank)]
    found = watched([*command, "--overwrite", "--restart", "--report", str(report)])
    result = json.loads(report.read_text(encoding="utf-8"))
    return {
        **found,
        "decomposing_seconds": round(sum(layer["seconds"] for layer in result["layers"]), 1),
        "base_bytes": result["base_bytes"],
        "by_kind": result["by_kind"],
    }


def layer_seconds(method: str, rank: int) -> float:
    """Return the time that one method needs for one decoder layer's weights."""
    weights = {name: weight(*shape, seed).to(DEVICE) for seed, (name, shape) in enumerate(SHAPES.items())}
    if DEVICE == "cuda":  # whose libraries load with their first use
        _action(method, dict([next(iter(weights.items()))]), rank)()
    return seconds_of(_action(method, weights, rank))


def _action(method: str, weights: dict[str, torch.Tensor], rank: int) -> Callable[[], Any]:
    from qosora.decompose import factorize_with_report

    if method == "qosora":
        return lambda: [factorize_with_report(w, rank) for w in weights.values()]
    if method == "nf4":
        quantize = torch.ops.bitsandbytes.quantize_4bit.default
        return lambda: [quantize(w, 64, "nf4", torch.uint8) for w in weights.values()]
    if method == "theory":
        return partial(_theory_of_all, weights.values(), rank)
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = nn.Module()
    for name, w in weights.items():
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device="meta")
        linear.weight = nn.Parameter(w)
        model.add_module(name.replace(".", "_"), linear)
    targets = [name for name, _ in model.named_children()]
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=method, target_modules=targets)
    return lambda: get_peft_model(model, config)


def _theory_of_all(weights: Iterable[torch.Tensor], rank: int) -> None:
    from qosora.decompose import nf4

    for weight in weights:
        _theory(weight.float(), rank, nf4.quantize)


def _theory(W: torch.Tensor, rank: int, quantize: Callable[[torch.Tensor], Any]) -> None:
    """Do the products of a randomized SVD with 4 iterations and 16 more columns, and quantize W, U, V."""
    m, n = W.shape
    right, left = (torch.randn(size, rank + 16, device=W.device) for size in (n, m))
    for _ in range(5):
        W @ right
        W.T @ left
    for tensor in (W, right[:, :rank], left[:, :rank]):
        quantize(tensor.T.contiguous() if tensor is not W else tensor)


def compare(methods: Sequence[str], rank: int, rounds: int, threads: int, output: Path) -> dict[str, Any]:
    """Time one decoder layer's weights by some methods in turns, each time in a process of its own."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    peaks = dict.fromkeys(methods, 0)
    for _ in range(rounds):
        for method in methods:
            file = output.with_suffix(".tmp")
            command = [sys.executable, __file__, "--method", method, "--rank", str(rank), "--output", str(file)]
            command += ["--miniature"] * MINIATURE
            peaks[method] = max(peaks[method], watched(command)["peak_anonymous_bytes"])
            seconds[method].append(json.loads(file.read_text(encoding="utf-8")))
            file.unlink()
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    return {
        "threads": threads,
        "seconds": {method: [round(value, 2) for value in values] for method, values in seconds.items()},
        "median_seconds": {method: round(value, 2) for method, value in medians.items()},
        "peak_anonymous_bytes": peaks,
        **{
            key: round(medians["qosora"] / medians[method], 3)
            for key, method in (("ratio_to_theory", "theory"), ("ratio_to_pissa", "pissa_niter_4"))
            if method in medians
        },
    }


def affordable_layers(folder: Path) -> int:
    """Return how many layers the disk has room for: checkpoint, base, and a tenth to spare."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model" / "config.json").is_file():
        made: int = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        return made
    per_layer = sum(m * n for m, n in SHAPES.values()) * (2 + 0.6)
    room = shutil.disk_usage(folder).free * 0.9 - 4 * 2 * VOCABULARY * HIDDEN
    return max(1, min(LAYERS, int(room / per_layer)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room for about 18 GB; what is there is used again")
    parser.add_argument("--rank", type=int, default=128, help="(default: 128)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 32, or what the disk has room for)")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison (default: 3; 0 for none)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of the comparison")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file")
    parser.add_argument("--resume", action="store_true", help="keep the stages in the result file")
    parser.add_argument("--miniature", action="store_true", help="tiny and short, to see that the script runs")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args()
    if args.method:
        args.output.write_text(json.dumps(layer_seconds(args.method, args.rank)), encoding="utf-8")
        return
    if args.folder is None:
        parser.error("--folder is required")
    layers = args.layers or affordable_layers(args.folder)
    shapes = "miniature" if MINIATURE else "Llama-2-7B"
    config = {"shapes": shapes, "layers": layers, "rank": args.rank, "rounds": args.rounds}
    question = "How fast, and in how much memory, is a checkpoint converted?"
    record = Record(args.output, "convert", question, config, args.resume)
    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    if args.rounds:
        record.stage("one_layer", lambda: compare(args.methods, args.rank, args.rounds, threads, args.output))
    record.stage("checkpoint", lambda: make_checkpoint(args.folder / "model", layers))
    record.stage("conversion", lambda: convert(args.folder, args.rank))


if __name__ == "__main__":
    main()
