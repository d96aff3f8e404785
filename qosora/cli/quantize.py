"""`qosora quantize`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from qosora.cli.options import add_json, add_overwrite, add_push, add_shards, pushed
from qosora.cli.output import print_json, progress_bar, size, table
from qosora.decompose import EMBEDDINGS
from qosora.errors import ConfigError

NAME = "quantize"
HELP = "decompose a model and write it as a 4-bit base"
EXAMPLES = """\
  qosora quantize meta-llama/Llama-2-7b-hf llama-2-7b-qosora
  qosora quantize ./my-model ./my-base --rank 256 --rank-pattern down_proj=128
  qosora quantize model.Q8_0.gguf ./my-base
  qosora quantize answerdotai/ModernBERT-base ./my-base --labels negative positive
  accelerate launch --num_processes 8 -m qosora quantize ./my-model ./my-base"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", metavar="SRC", help="model folder, hub id, or GGUF file")
    parser.add_argument("output", metavar="OUT", help="folder to make")
    # What is not given stays out: the defaults are those of `QosoraConfig`, which needs torch
    parser.add_argument("--rank", type=int, help="singular triplets per layer (default: 128)")
    parser.add_argument(
        "--rank-pattern", action="append", default=[], metavar="NAME=RANK", help="rank of some layers; repeatable"
    )
    parser.add_argument("--svd", choices=("randomized", "exact"), help="(default: randomized)")
    parser.add_argument("--svd-iterations", type=int, help="of the randomized SVD (default: 4)")
    parser.add_argument("--seed", type=int, help="seed of the randomized SVD")
    parser.add_argument(
        "--scale", choices=("columns", "none"), help="bring each weight's columns to one norm first (default: columns)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="scale columns by the activations that they meet on this text, too"
    )
    parser.add_argument("--quant-type", choices=("nf4", "fp4"), help="4-bit format (default: nf4)")
    parser.add_argument("--blocksize", type=int, help="values per quantization block (default: 64)")
    parser.add_argument("--no-double-quant", action="store_true", help="keep the blocks' scales in 32 bits")
    parser.add_argument(
        "--embeddings",
        choices=EMBEDDINGS,
        help="quantize embeddings and output layer: in 8 bits, or decomposed in 4 (default: leave in 16 bits)",
    )
    parser.add_argument(
        "--labels", nargs="+", default=[], metavar="NAME", help="make a classifier of these classes, with a new head"
    )
    parser.add_argument(
        "--task",
        choices=("text-classification", "token-classification", "reward"),
        help="what --labels are of, texts or words (default: texts); or a model of rewards, without labels",
    )
    parser.add_argument("--skip", nargs="+", metavar="NAME", help="linear layers to leave as they are")
    parser.add_argument(
        "--compute-dtype", choices=("bfloat16", "float16", "float32"), help="dtype of the products outside autocast"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of what is not decomposed (default: SRC's)"
    )
    parser.add_argument("--device", help="where to decompose, e.g. cuda:1 (default: the GPU, if there is one)")
    add_shards(parser)
    parser.add_argument(
        "--check", metavar="FILE", help="compare the base with SRC on this text: divergence of the next token"
    )
    parser.add_argument("--report", metavar="FILE", help="write the errors of all layers as JSON there")
    add_overwrite(parser)
    add_push(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that SRC brings")
    add_json(parser)


#: Of a calibration's data; there are more tokens in them than are used.
_CALIBRATION_RECORDS = 2000
#: Options of `QosoraConfig` that are called the same here.
_STORAGE = ("rank", "svd", "svd_iterations", "seed", "scale", "quant_type", "blocksize", "embeddings", "compute_dtype")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.base import divergence, quantize
    from qosora.base.inspected import inspected
    from qosora.checkpoints import Processes, Progress, expanded, write_atomically
    from qosora.config import QosoraConfig
    from qosora.dtypes import dtype_named

    if args.report and not os.access(Path(expanded(args.report)).parent, os.W_OK):  # before the work
        raise ConfigError(f"--report {args.report}: its folder is not there, or cannot be written to")
    storage: dict[str, Any] = {name: value for name in _STORAGE if (value := getattr(args, name)) is not None}
    if args.scale == "none":
        storage["scale"] = None
    if args.check and (args.task or args.labels):
        raise ConfigError("--check compares with SRC, and a model of another task says nothing like it; leave it out")
    if args.calibration is not None:
        if args.scale is not None:
            raise ConfigError("--calibration is a scale of its own; leave out --scale")
        storage |= {"scale": "calibrated", "calibration": _token_lists(args, args.calibration)}
    config = QosoraConfig(
        rank_pattern=_ranks(args.rank_pattern),
        double_quant=not args.no_double_quant,
        modules_to_not_convert=args.skip,
        **storage,
    )
    with progress_bar("decomposing", hidden=args.json) as show:

        def progress(state: Progress) -> None:
            layers = [report for report in state.reports.values() if report]
            error, plain = (fmean(layer[key] for layer in layers) if layers else 0.0 for key in ("error", "nf4_error"))
            show(state, f", error {error:.4f} (plain {config.quant_type} {plain:.4f})" if layers else "")

        report = quantize(
            args.source,
            args.output,
            config,
            task=args.task,
            labels=args.labels,
            dtype=args.dtype and dtype_named(args.dtype),
            device=args.device,
            max_shard_bytes=int(args.max_shard_size * 1e9),
            overwrite=args.overwrite,
            restart=args.restart,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    if Processes().index:  # the first of several processes reports
        return
    inspected(args.output)  # what was written is what was meant, and `qosora inspect` tells it at once
    if args.report:
        write_atomically(expanded(args.report), json.dumps(report.to_dict(), indent=2) + "\n")
    found = None
    if args.check:
        texts = _token_lists(args, args.check)
        found = divergence(
            args.source, args.output, texts, device=args.device, trust_remote_code=args.trust_remote_code
        )
    if args.json:
        checked = {"check": asdict(found)} if found else {}
        print_json(report.to_dict() | checked | pushed(args.output, args.push_to_hub))
        return
    print(kinds_table(report.by_kind(), config.quant_type))
    print(f"\n{args.output}: {size(report.base_bytes)}, {len(report.layers)} layers, {report.seconds:.0f} s")
    if found is not None:
        print(
            f"against {args.source}: KL divergence {found.kl:.4f} nats a token, the same likeliest token for "
            f"{found.same_top:.1%} of {found.tokens:,}, loss {found.base_loss:.4f} (original {found.original_loss:.4f})"
        )
    method = "" if not (args.task or args.labels) else f" --method {'reward' if args.task == 'reward' else 'classify'}"
    print(f"next: qosora train{method} --model {args.output} --data DATA.jsonl --output-dir ADAPTER")
    for address in pushed(args.output, args.push_to_hub).values():
        print(address)


def _token_lists(args: argparse.Namespace, file: str) -> list[list[int]]:
    """Return the tokens of some data, rendered as in training."""
    from qosora.base import load_tokenizer
    from qosora.checkpoints import open_source
    from qosora.data import load_records, tokenize

    with open_source(args.source, trust_remote_code=args.trust_remote_code) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.origin, trust_remote_code=args.trust_remote_code)
    records = load_records(file, limit=_CALIBRATION_RECORDS)
    return [example.input_ids.tolist() for example in tokenize(records, tokenizer).examples]


def kinds_table(kinds: dict[str, dict[str, Any]], quant_type: str) -> str:
    """Return the table of errors by kind of layer."""
    timed = any("seconds" in row for row in kinds.values())
    return table(
        ["layer", "count", "error", "bits/param", f"plain {quant_type}", "its bits", *(["seconds"] if timed else [])],
        [
            [
                kind,
                f"{row['layers']:.0f}",
                f"{row['error']:.4f}",
                f"{row['bits_per_parameter']:.2f}",
                f"{row['nf4_error']:.4f}",
                f"{row['nf4_bits_per_parameter']:.2f}",
                *([f"{row['seconds']:.1f}"] if timed else []),
            ]
            for kind, row in kinds.items()
        ],
    )


def _ranks(pairs: list[str]) -> dict[str, int]:
    ranks = {}
    for pair in pairs:
        name, _, rank = pair.rpartition("=")
        if not name or not rank.isdigit():
            raise ConfigError(f"--rank-pattern takes NAME=RANK, e.g. down_proj=256, got {pair!r}")
        ranks[name] = int(rank)
    return ranks
