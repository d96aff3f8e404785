"""`qosora plan`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qosora.cli.options import add_json, at_least_one
from qosora.cli.output import print_json, size, table
from qosora.decompose import EMBEDDINGS
from qosora.training import OPTIMIZER_NAMES, PLACES, STRATEGIES, TrainConfig

if TYPE_CHECKING:
    from qosora.memory import Plan, Usage

NAME = "plan"
HELP = "predict the memory of fine-tuning a model, without its weights and without a GPU"
EXAMPLES = """\
  qosora plan llama-3.1-8b --seq-len 2048 --gpu-memory 24GiB
  qosora plan Qwen/Qwen3-4B --gpu "RTX 4090" --batch-size 8
  qosora plan ./my-base --seq-len 8192 --no-gradient-checkpointing --json
  qosora plan google/gemma-3-4b-it --images 1 --image-size 896x896 --gpu-memory 12GiB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="hub id, folder, config.json, or a built-in shape such as llama-3.1-8b"
    )
    add_step(parser)
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of the card, such as 24GiB (default: this GPU's)")
    parser.add_argument("--gpu", metavar="NAME", help='a card by its name, e.g. "RTX 4090"')
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="to plan for (default: cuda)")
    parser.add_argument("--gpus", type=at_least_one, default=1, metavar="N", help="cards that train together [1]")
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default="ddp", help="each holds the base, or its part of it (fsdp) [ddp]"
    )
    parser.add_argument("--base-on", choices=PLACES, default="gpu", help="where the base is [gpu]")
    parser.add_argument(
        "--link", type=float, metavar="GB/S", help="from host memory to the card, with --base-on host [25]"
    )
    parser.add_argument("--tflops", type=float, metavar="X", help="of the card, likewise [half of what its maker says]")
    parser.add_argument("--images", type=at_least_one, metavar="N", help="of each example, for a model that sees")
    parser.add_argument(
        "--image-size", type=_size, default=(1024, 1024), metavar="WxH", help="of each image, pixels [1024x1024]"
    )
    parser.add_argument("--no-qlora", action="store_true", help="do not compare with PEFT QLoRA, r=16")
    add_report(parser)
    parser.add_argument("--no-grid", action="store_true", help="plan this batch size and length only")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that MODEL brings")
    add_json(parser)


def _size(text: str) -> tuple[int, int]:
    """Return the width and height that an option gives. argparse makes usage errors of what this raises."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be a width and a height, such as 1024x768, got {text!r}")
    return int(width), int(height)


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add --report."""
    parser.add_argument("--report", metavar="DIR", help="draw pictures, an HTML page and a memory_viz snapshot there")


def add_step(parser: argparse.ArgumentParser, precision: str | None = "bf16") -> None:
    """Add the options that decide about a step's memory, with the defaults of `qosora train`."""
    yes_no: Any = argparse.BooleanOptionalAction
    defaults = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}
    batch_size, length = defaults["batch_size"], defaults["max_length"]
    parser.add_argument("--rank", type=at_least_one, metavar="N", help="of the decomposition (default: a base's, 128)")
    parser.add_argument(
        "--embeddings",
        choices=EMBEDDINGS,
        help="how embeddings and output layer are stored (default: a base's, 16 bits)",
    )
    parser.add_argument(
        "--batch-size", type=at_least_one, default=batch_size, metavar="N", help=f"examples at once [{batch_size}]"
    )
    parser.add_argument(
        "--seq-len", type=at_least_one, default=length, metavar="N", help=f"tokens of each example [{length}]"
    )
    parser.add_argument(
        "--padding", action=yes_no, help="examples differ in length, so attention needs a mask [if there are several]"
    )
    parser.add_argument("--packing", action="store_true", help="several examples are packed into each sequence")
    parser.add_argument("--update-rank", type=int, default=0, metavar="K", help="of the matrix trained beside them [0]")
    parser.add_argument("--vectors", choices=("both", "s", "o"), default="both", help="vectors to train [both]")
    parser.add_argument(
        "--gradient-checkpointing", action=yes_no, default=True, help="recompute activations in backward [yes]"
    )
    parser.add_argument("--chunked-loss", action=yes_no, default=True, help="never build all logits [yes]")
    parser.add_argument(
        "--tile-length", type=int, metavar="N", help="tokens of the tiles that MLPs compute in [4096; 0: none]"
    )
    parser.add_argument("--activation-offloading", action="store_true", help="keep activations in host memory")
    parser.add_argument(
        "--attn-implementation",
        choices=("sdpa", "eager"),
        help="flash_attention_2 needs as much as sdpa",
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZER_NAMES, default=OPTIMIZER_NAMES[0], help=f"[{OPTIMIZER_NAMES[0]}]"
    )
    help = f"of activations [{precision or 'bf16 on a GPU, fp32 on a CPU'}]"
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default=precision, help=help)


_STEP = (
    "rank", "embeddings", "batch_size", "seq_len", "padding", "packing", "vectors", "update_rank",
    "gradient_checkpointing", "chunked_loss", "tile_length", "activation_offloading", "attn_implementation",
    "optimizer", "precision", "trust_remote_code",
)  # fmt: skip


def step_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options of `add_step`, but those that have none."""
    return {name: value for name in _STEP if (value := getattr(args, name)) is not None}


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qosora.memory.plan import plan
    from qosora.pages import require_plots

    if args.report:
        require_plots()
    options = step_options(args)
    inputs = None
    if args.images:
        from qosora.memory import batch_with_images

        asked = {name: options[name] for name in ("batch_size", "seq_len") if name in options}
        size = args.image_size
        inputs = batch_with_images(
            args.model, images=args.images, image_size=size, trust_remote_code=args.trust_remote_code, **asked
        )
    found = plan(
        args.model,
        gpu=args.gpu,
        gpu_memory=args.gpu_memory,
        compare=not args.no_qlora,
        grid=not args.no_grid,
        device=args.device,
        gpus=args.gpus,
        strategy=args.strategy,
        base_on=args.base_on,
        link=args.link,
        tflops=args.tflops,
        inputs=inputs,
        **options,
    )
    if args.json:
        print_json(found.to_dict())
    else:
        print("\n".join(_lines(found)))
    if args.report:
        from qosora.memory import events
        from qosora.memory.report import report

        report(found, events(args.model, found, inputs=inputs, trust_remote_code=args.trust_remote_code), args.report)


def _lines(found: Plan) -> list[str]:
    batch = found.batch
    lines = [
        f"{found.model}: rank {found.rank}, {found.trained_parameters:,} trained parameters; {batch.size} x "
        f"{batch.length} tokens{', padded' * batch.padding}{', packed' * batch.packing}, {found.options.precision}, "
        f"checkpointing {'on' if found.options.gradient_checkpointing else 'off'}",
        "",
        usage_table(found.usage, found.qlora),
        "",
        f"peak: {where(found.usage)}",
    ]
    if found.verdict is not None and found.card.memory_bytes is not None:
        words = {"fits": "fits into", "tight": "fits tightly, if at all, into", "no": "does not fit into"}
        memory = f" ({size(found.card.memory_bytes)})" * (not found.card.name.endswith("GiB"))
        lines += ["", f"{words[found.verdict]} {found.card.name}{memory}"]
    if (streaming := found.streaming) is not None:
        free = (
            f"; from {streaming.free_from:,} tokens in a batch on, copying takes no time"
            if streaming.free_from is not None
            else ""
        )
        lines.append(f"in host memory: {size(streaming.host_bytes)} of the base in each process{free}")
    if found.largest_batch is not None:
        lines.append(f"largest batch at {batch.length} tokens: {found.largest_batch or 'none fits'}")
        lines.append(f"longest sequence at batch size {batch.size}: {found.longest_sequence or 'none fits'}")
    for advice in found.advice:
        lines.append(
            f"  {advice.change}: saves {size(advice.saved_bytes)}, {size(advice.total_bytes)} then"
            + ("" if advice.fits else ", not enough by itself")
        )
    if found.grid:
        lines += ["", "total by batch size and sequence length (+ fits, ~ tight, - does not fit):", _grid(found)]
    return [*lines, "", *(f"assumed: {text}" for text in found.assumptions)]


def usage_table(usage: Usage, qlora: Usage | None) -> str:
    """Return the table of bytes by category, with PEFT QLoRA's beside them."""
    columns = [usage] if qlora is None else [usage, qlora]
    names = list(dict.fromkeys(name for column in columns for name in column.rows))
    last = [name for name in usage.rows if name in ("allocator overhead", "CUDA context")]
    names = [name for name in names if name not in last] + last
    rows = [[name, *(size(c.rows[name]) if name in c.rows else "" for c in columns)] for name in names]
    rows.append(["allocated by PyTorch", *(size(c.allocated_bytes) for c in columns)])
    rows.append(["in all", *(size(c.total_bytes) for c in columns)])
    return table(["at the peak", "qosora", "QLoRA r=16"][: len(columns) + 1], rows)


def where(usage: Usage) -> str:
    """Say where the peak of a step is."""
    layer = "" if usage.layer is None else f" of layer {usage.layer}"
    module = usage.module.removeprefix("layers.*").strip(".") or ("layer" if layer else "step")
    return f"{usage.phase}, {module}{layer}, {usage.op}"


def _grid(found: Plan) -> str:
    marks = {"fits": "+", "tight": "~", "no": "-", None: ""}
    lengths = sorted({cell.seq_len for cell in found.grid})
    rows: dict[int, list[str]] = {}
    for cell in found.grid:
        row = rows.setdefault(cell.batch_size, [str(cell.batch_size)])
        row.append(f"{size(cell.total_bytes)} {marks[cell.verdict]}".strip())
    return table(["batch", *map(str, lengths)], list(rows.values()))
