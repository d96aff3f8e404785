"""`qosora export`."""

from __future__ import annotations

import argparse
import math
from typing import Any

from qosora.cli.options import add_json, add_overwrite, add_push, pushed
from qosora.cli.output import print_json, progress_bar, size
from qosora.errors import ConfigError

NAME = "export"
HELP = "write adapters as an ordinary checkpoint, a LoRA of the original model, or a GGUF file"
EXAMPLES = """\
  qosora export ./my-adapter ./my-model --verify
  qosora export ./my-adapter ./my-model --onto original --original meta-llama/Llama-2-7b-hf
  qosora export ./my-adapter ./my-lora --format lora --rank-reduce 16
  qosora export ./my-adapter ./my-gguf --format gguf --quant q4_k_m --llama-cpp ~/llama.cpp --ollama --verify
  qosora export ./my-base ./my-model --adapter ./maths=0.7 --adapter ./code=0.3
  qosora export ./my-base ./dequantized"""

_WHICH = """

--onto dequantized is the model that was trained and evaluated; it needs nothing
but base and adapter. --onto original leaves the quantization error behind, which
training has partly worked around: where the last bit of loss counts, evaluate
both (Gemma 3 270M on GSM8K, test loss: 0.913 in qosora, 0.914 onto dequantized,
0.917 onto original). A LoRA is the same as --onto original, for programs that
load it beside the original model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = f"{parser.description}{_WHICH}"
    parser.add_argument("model", metavar="MODEL", help="an adapter; or a base, as it is or with --adapter")
    parser.add_argument("output", metavar="OUT", help="folder to make; transformers or PEFT load it, without qosora")
    parser.add_argument("--base", metavar="BASE", help="the adapter's base, where it is not where the adapter says")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help="with a base as MODEL; repeatable. The vectors are s_base + the sum of WEIGHT (s - s_base), and o "
        "likewise (default: 1)",
    )
    parser.add_argument(
        "--format",
        choices=("merged", "lora", "gguf"),
        default="merged",
        help="checkpoint, PEFT LoRA, or a file for llama.cpp (default: merged)",
    )
    parser.add_argument(
        "--quant",
        metavar="KIND",
        help="of a GGUF file: f32, f16, bf16, q8_0, or what llama-quantize makes, such as q4_k_m (default: q8_0)",
    )
    parser.add_argument(
        "--llama-cpp",
        metavar="DIR",
        help="for GGUF: folder of llama.cpp, a checkout or a release (default: its programs on the path)",
    )
    parser.add_argument(
        "--ollama",
        action="store_true",
        default=None,
        help="write a Modelfile for Ollama beside the GGUF file: chat template, where a reply stops",
    )
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        help="merge into the weights that training saw, or into the original's (default: dequantized)",
    )
    parser.add_argument(
        "--original",
        metavar="SRC",
        help="folder, hub id or GGUF file that the base was made of (default: what the base's manifest names)",
    )
    parser.add_argument(
        "--rank-reduce",
        type=int,
        metavar="K",
        help="of a LoRA: the best one of rank K (default: exact, the base's rank)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights, which are merged in float32 and cast once (default: the base's)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with the adapted model's, in a process that cannot import qosora, and of a GGUF file what "
        "llama.cpp's server says follows; if they differ, OUT is not made. Needs memory for the whole model",
    )
    parser.add_argument("--max-shard-size", type=float, metavar="GB", help="of a checkpoint's files (default: 1)")
    add_overwrite(parser)
    add_push(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that the base brings")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.export import export_gguf, export_lora, export_merged

    base, adapters = _source(args)
    shared = {
        "original": args.original,
        "dtype": args.dtype,
        "verify": args.verify,
        "overwrite": args.overwrite,
        "restart": args.restart,
        "trust_remote_code": args.trust_remote_code,
    }
    with progress_bar("exporting", hidden=args.json) as show:
        report: Any
        if args.format == "lora":
            _refuse(args, "lora", "onto", "max_shard_size", "quant", "llama_cpp", "ollama")
            if not adapters:
                raise ConfigError(f"{base} is a base; name the adapter that is to become a LoRA")
            report = export_lora(base, args.output, adapters, rank=args.rank_reduce, progress=show, **shared)
        elif args.format == "gguf":
            _refuse(args, "gguf", "rank_reduce", "max_shard_size")
            report = export_gguf(
                base,
                args.output,
                adapters or None,
                quant=args.quant or "q8_0",
                llama_cpp=args.llama_cpp,
                ollama=bool(args.ollama),
                onto=args.onto or "dequantized",
                progress=show,
                **shared,
            )
        else:
            _refuse(args, "merged", "rank_reduce", "quant", "llama_cpp", "ollama")
            report = export_merged(
                base,
                args.output,
                adapters or None,
                onto=args.onto or "dequantized",
                max_shard_bytes=int((1.0 if args.max_shard_size is None else args.max_shard_size) * 1e9),
                progress=show,
                **shared,
            )
    result: dict[str, Any] = report.to_dict()
    if args.json:
        print_json(result | pushed(args.output, args.push_to_hub))
        return
    print("\n".join(_lines(args, result)))
    for address in pushed(args.output, args.push_to_hub).values():
        print(address)


def _source(args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Return the base, and the adapters with their weights."""
    from qosora.checkpoints import split_source

    base, adapter = split_source(args.model, args.base)
    if adapter is None:
        weights = [_weighted(text) for text in args.adapter]
        if len(dict(weights)) < len(weights):
            raise ConfigError("--adapter names the same folder twice; add up the weights")
        return base, dict(weights)
    if args.adapter:
        raise ConfigError(f"{args.model} is an adapter; with --adapter, MODEL is their base")
    return base, {adapter: 1.0}


def _weighted(text: str) -> tuple[str, float]:
    """Return what --adapter says: a folder whose name may hold a "=", and a weight."""
    name, _, weight = text.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        return text, 1.0
    if not name or not math.isfinite(number):
        raise ConfigError(f"--adapter takes DIR or DIR=WEIGHT, e.g. ./maths=0.7, got {text!r}")
    return name, number


def _refuse(args: argparse.Namespace, form: str, *options: str) -> None:
    for option in options:
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} says nothing about --format {form}; leave it out")


def _gguf_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['output']}/{result['file']}: {size(result['total_bytes'])}, for llama.cpp"]
    if result["modelfile"]:
        lines.append(
            f"ollama create MY-MODEL -f {result['output']}/Modelfile"
            + ("" if result["template"] else " (without a chat template; the file says why)")
        )
    if found := result["verification"]:
        lines.append(
            f"verified with llama.cpp: the tokenizer's own {found['tokens']} tokens of some texts; what follows "
            f"differs from the merged model by {found['mean_difference']:.2g} nats on average, at {found['places']} "
            f"places; {found['equal_top_tokens']:.1%} equal top tokens"
        )
    return lines


def _lines(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    if args.format == "gguf":
        return _gguf_lines(result)
    bytes_ = size(result["total_bytes"])
    if args.format == "lora":
        lines = [f"{args.output}: rank {result['rank']}, {bytes_} in {result['dtype']}, a LoRA of {result['original']}"]
        if args.rank_reduce:
            lines.append(f"reducing the rank loses {result['rank_error']:.1%} of what was learned (Frobenius norm)")
    else:
        lines = [f"{args.output}: {bytes_} in {result['dtype']}, loads with plain transformers"]
    if result.get("quantization_error") is not None:
        lines.append(f"left behind: the base's quantization error, {result['quantization_error']:.4f} of the weights")
    if found := result["verification"]:
        lines.append(
            f"verified on {found['tokens']} tokens against the {found['reference']}: logits differ by "
            f"{found['largest_difference']:.2g} at most, {found['mean_difference']:.2g} on average; "
            f"{found['equal_top_tokens']:.1%} equal top tokens"
        )
    return lines
