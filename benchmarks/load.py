"""How long, and in how much memory, does a base load for training?

From checkpoints with random weights, which it makes in a temporary folder: a qosora base (converted from the 16-bit
checkpoint), a checkpoint that bitsandbytes has saved in NF4, and the 16-bit one, quantized by bitsandbytes while it
loads. Each is loaded in a fresh process, with its files in the page cache, and gets its adapter: OSoRA, or LoRA on all
linear layers. On a CPU a weight may stay mapped from its file, so loading ends when all of them were read once.

    python benchmarks/load.py --output benchmarks/results/load_cpu.json --threads 2
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from common import Record, arguments, memory_peaks, quantiles, synchronize
from methods import LORA_RANK, MINIATURE, layer_shapes, shape_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qosora.base import quantize
from qosora.config import OsoraConfig, QosoraConfig
from qosora.memory import StepOptions, fill_at_random, meta_model

QUESTION = "How long, and in how much memory, does a base load for training?"
#: Way of loading, and the folder that it loads.
WAYS = {"qosora": "qosora", "nf4": "nf4", "nf4-on-the-fly": "16-bit"}
_SHARD = 2_000_000_000  # bytes


def nf4_config() -> BitsAndBytesConfig:
    """Return QLoRA's storage."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def affordable_layers(shape: str, folder: Path) -> int:
    """Return how many of a shape's layers disk and page cache have room for, three times, with some to spare."""
    config = shape_config(shape)
    sizes = [(*map(int, size.split("x")), count) for size, count in layer_shapes(shape.partition(":")[0]).items()]
    per_layer = sum(m * n * count for m, n, count in sizes) * (2 + 0.6 + 0.6)
    room = min(shutil.disk_usage(folder).free * 0.9, psutil.virtual_memory().available * 0.5)
    ends = 2 * config.vocab_size * config.hidden_size * 2
    return max(1, min(config.num_hidden_layers, int((room - 3 * ends) / per_layer)))


def make(folder: Path, shape: str, rank: int, device: str) -> dict[str, Any]:
    """Write the three checkpoints, of as many layers as there is room for."""
    name = shape.partition(":")[0]
    config = shape_config(f"{name}:{affordable_layers(shape, folder)}")
    model = meta_model(config, StepOptions())
    fill_at_random(model, device)
    model.save_pretrained(folder / "16-bit", max_shard_size=_SHARD)
    del model
    quantize(folder / "16-bit", folder / "qosora", QosoraConfig(rank=rank), max_shard_bytes=_SHARD)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "16-bit", quantization_config=nf4_config(), dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "nf4", max_shard_size=_SHARD)
    del model
    gc.collect()
    sizes = {kind: sum(file.stat().st_size for file in (folder / kind).glob("*.safetensors")) for kind in WAYS.values()}
    return {"shape": name, "layers": config.num_hidden_layers, "bytes": sizes}


def load(way: str, folder: Path, threads: int, output: Path) -> None:
    """Load a base and give it an adapter; write what that took. Runs in a process of its own."""
    torch.set_num_threads(threads)
    options = {"quantization_config": nf4_config()} if way == "nf4-on-the-fly" else {}
    synchronize()  # CUDA's own start is no part of it
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    for p in model.parameters():
        if p.device.type == "cpu":
            p.detach().flatten().view(torch.uint8)[::4096].sum()  # of every page one byte
    synchronize()
    loaded = time.perf_counter()
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, OsoraConfig() if way == "qosora" else lora)
    synchronize()
    found = {"load": loaded - start, "adapter": time.perf_counter() - loaded}
    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    output.write_text(json.dumps({"seconds": found, "peak_allocated_bytes": allocated}), encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoints and load in all ways, in turns."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        made = make(Path(name), args.shape, args.rank, args.device)
        return {**made, "ways": compare(Path(name), args.rounds, torch.get_num_threads())}


def compare(folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Load in all ways, in turns."""
    # A server that has done the imports forks the processes. It would initialise CUDA, which then cannot be used.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["qosora.memory.profile", "transformers.models.llama.modeling_llama"])
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, checkpoint in WAYS.items():
            for file in (folder / checkpoint).iterdir():
                _read(file)
            output = folder / "found.json"
            process = context.Process(target=load, args=(way, folder / checkpoint, threads, output))
            process.start()
            assert process.pid is not None
            peaks = memory_peaks(process.pid, process.is_alive)
            process.join()
            if process.exitcode:
                raise SystemExit(f"loading {way} failed")
            runs[way].append({**json.loads(output.read_text(encoding="utf-8")), **peaks})
    return {way: _summary(found) for way, found in runs.items()}


def _read(file: Path) -> None:
    """Bring a file into the page cache."""
    with file.open("rb") as opened:
        while opened.read(2**24):
            pass


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [{**run["seconds"], "both": sum(run["seconds"].values())} for run in runs]
    peaks = {key: [run[key] for run in runs] for key in runs[0] if key.startswith("peak")}
    return {
        "seconds": {part: quantiles([found[part] for found in seconds]) for part in seconds[0]},
        **{key: None if None in values else max(values) for key, values in peaks.items()},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--shape", default="llama-2-7b:8", metavar="NAME[:LAYERS]", help="fewer where room is short")
    parser.add_argument("--rank", type=int, default=128, help="of qosora's factors (default: 128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    args = arguments(parser, shape=MINIATURE, rounds=1)
    config = {"shape": args.shape, "rank": args.rank, "lora_rank": LORA_RANK, "rounds": args.rounds}
    record = Record(args.output, "load", QUESTION, config, args.resume)
    record.stage("load", partial(measure, args))


if __name__ == "__main__":
    main()
