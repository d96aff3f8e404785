"""How fast, and in how much memory, does an adapter leave; and which of the ways out keeps what was learned?

    python benchmarks/export.py --folder /big/disk                    # 7B: the folder that convert.py has filled
    python benchmarks/export.py --gsm8k WORK --adapter qosora_lr0.01  # losses: the work folder of gsm8k.py

The first exports a base of Llama-2-7B's shapes, with an adapter of random vectors, in all three ways by the command
line, and copies what was written with `cp`. Without a base in the folder it makes one, of `--layers` layers. The second
measures losses on GSM8K's test questions: of the adapted model, and of each export as others load it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Record, watched
from convert import make_checkpoint
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qosora.base import load_base, load_model, load_tokenizer
from qosora.checkpoints import CheckpointReader, group_modules, stored_fingerprint
from qosora.config import OsoraConfig
from qosora.data import load_records
from qosora.export import export_lora, export_merged
from qosora.inference import evaluate

RESULTS = Path(__file__).parent / "results"
QUESTION = "How fast, and in how much memory, does an adapter leave, and what do its exports lose?"
WAYS = {
    "dequantized": ["--onto", "dequantized"],
    "original": ["--onto", "original"],
    "lora": ["--format", "lora"],
}


def make_base(folder: Path, layers: int, rank: int) -> dict[str, Any]:
    """Make checkpoint and base, unless they are there, and an adapter whose vectors are moved at random."""
    if not (folder / "base" / "config.json").is_file():
        made = make_checkpoint(folder / "model", layers)
        command = [sys.executable, "-m", "qosora", "quantize", str(folder / "model"), str(folder / "base")]
        subprocess.run([*command, "--rank", str(rank)], check=True)
        print(f"made {made}")
    generator = torch.Generator().manual_seed(0)
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    with CheckpointReader(folder / "base") as base:
        vectors = {
            f"base_model.model.{module}.osora_{kind}": base.tensor(f"{module}.{kind}")
            for module in group_modules(base.names())
            for kind in ("s", "o")
        }
        config = OsoraConfig(base_model_name_or_path=str(folder / "base"), base_fingerprint=stored_fingerprint(base))
        moved = {key: v * (1 + 0.05 * torch.randn(v.shape, generator=generator)) for key, v in vectors.items()}
    save_file(moved, adapter / "adapter_model.safetensors")
    config.save_pretrained(str(adapter))
    sizes = {name: folder_bytes(folder / name) for name in ("model", "base", "adapter")}
    found = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    return {"layers": found["num_hidden_layers"], "bytes": sizes}


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def timed_export(folder: Path, options: list[str]) -> dict[str, Any]:
    """Export by the command line; copy the result; remove both."""
    output, copy = folder / "export", folder / "copy"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "qosora", "export", str(folder / "adapter"), str(output)]
    found = watched([*command, "--base", str(folder / "base"), *options, "--restart", "--json"])
    written = folder_bytes(output)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(output), str(copy)], check=True)
    subprocess.run(["sync", "-f", str(copy)], check=True)  # the export, too, is on the disk when it ends
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    shutil.rmtree(output)
    return {
        **found,
        "bytes": written,
        "megabytes_per_second": round(written / found["seconds"] / 1e6, 1),
        "cp_seconds": round(seconds, 1),
        "cp_megabytes_per_second": round(written / seconds / 1e6, 1),
    }


def losses(work: Path, name: str, rank: int, limit: int) -> dict[str, Any]:
    """Return losses on test questions of the adapted model and of its exports, all computed in bfloat16."""
    base, adapter, original, out = work / f"base-r{rank}", work / name, work / "model", work / "exports"
    merged = {
        onto: export_merged(
            base,
            out / onto,
            adapter,
            onto=onto,
            original=original if onto == "original" else None,
            dtype="bfloat16",
            verify=True,
            overwrite=True,
            restart=True,
        )
        for onto in ("dequantized", "original")
    }
    loras = {
        f"lora_r{k or rank}": export_lora(
            base,
            out / f"lora{k or rank}",
            adapter,
            original=original,
            rank=k,
            verify=True,
            overwrite=True,
            restart=True,
        )
        for k in (None, 64, 16)
    }
    records = load_records(work / "test.jsonl", limit=limit)
    tokenizer = load_tokenizer(original)

    def plain(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    models: dict[str, Callable[[], Any]] = {
        "original_untrained": lambda: plain(original),
        "base_untrained": lambda: load_base(base, dtype=torch.bfloat16),
        "adapted": lambda: load_model(adapter, base=base, dtype=torch.bfloat16),
        **{f"merged_onto_{onto}": partial(plain, out / onto) for onto in merged},
        **{
            f"{lora}_on_original": partial(
                lambda folder: PeftModel.from_pretrained(plain(original), folder), report.output
            )
            for lora, report in loras.items()
        },
    }
    return {
        "questions": limit,
        "adapter_rank": rank,
        "loss": {name: round(evaluate(load(), tokenizer, records).loss, 4) for name, load in models.items()},
        "bytes": {name: report.total_bytes for name, report in (merged | loras).items()},
        "export_seconds": {name: round(report.wall_seconds, 1) for name, report in (merged | loras).items()},
        "quantization_error": round(merged["original"].quantization_error or 0.0, 4),
        "rank_error": {name: round(report.rank_error, 4) for name, report in loras.items()},
        "verification": {name: report.to_dict()["verification"] for name, report in (merged | loras).items()},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="with model/ and base/ of convert.py; room for two more of the model"
    )
    parser.add_argument("--layers", type=int, default=32, help="where there is no base yet (default: 32)")
    parser.add_argument("--rank", type=int, default=128, help="of the base (default: 128)")
    parser.add_argument("--gsm8k", type=Path, metavar="WORK", help="with the model, bases and adapters of gsm8k.py")
    parser.add_argument("--adapter", default="qosora", help="its folder in WORK (default: qosora)")
    parser.add_argument("--limit-test", type=int, default=128, help="test questions (default: 128)")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--resume", action="store_true", help="keep the stages in the result file")
    args = parser.parse_args()
    if args.folder:
        output = args.output or RESULTS / "export_llama2_7b.json"
        config = {"shapes": "Llama-2-7B", "rank": args.rank, "dtype": "bfloat16"}
        record = Record(output, "export", QUESTION, config, args.resume)
        record.stage("base", lambda: make_base(args.folder, args.layers, args.rank))
        for way, options in WAYS.items():
            record.stage(way, partial(timed_export, args.folder, options))
    if args.gsm8k:
        output = args.output or RESULTS / "export_gemma3_270m.json"
        config = {"model": "Gemma 3 270M", "data": "GSM8K", "adapter": args.adapter}
        record = Record(output, "export", QUESTION, config, args.resume)
        record.stage("gsm8k", lambda: losses(args.gsm8k, args.adapter, args.rank, args.limit_test))
    if not args.folder and not args.gsm8k:
        parser.error("--folder or --gsm8k is required")


if __name__ == "__main__":
    main()
