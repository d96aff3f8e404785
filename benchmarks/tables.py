"""Write the tables of README.md and docs from the files in benchmarks/results.

python benchmarks/tables.py           # rewrite what stands between the markers <!-- table: NAME --> and <!-- /table -->
python benchmarks/tables.py --check   # exit with 1 if a page says anything else than the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "quality"))

import quality_page
from gpu_tables import gpu, launches
from page import QLORA, conditions, gib, mib, table
from speed_tables import generate, layer_step, load, mixture_step, optimizer_step, train_step

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def gsm8k(found: dict[str, Any], file: str) -> str:
    """Return the table of losses before and after training, with its conditions."""
    results, config = found["results"], found["config"]
    before, rank = results["untrained_test_loss"], config["rank"]
    weights = results["factorization"][f"r{rank}"]
    qlora, qosora = _best(results, "qlora"), _best(results, "qosora")
    rows = [
        ["16-bit model, untrained", "", "", "", f"{before['bfloat16']:.3f}", ""],
        [f"QLoRA, r = {qlora['rank']}", f"{weights['nf4_error']:.3f}", *_sizes(qlora), *_losses(qlora)],
        [f"qosora, r = {rank}", f"{weights['error']:.3f}", *_sizes(qosora), *_losses(qosora)],
    ]
    head = ["", "error of the 4-bit weights", "trained parameters", "adapter", "test loss before", "after"]
    steps = f"{config['steps']} steps of {config['batch_size']} examples"
    rates = " and ".join(f"{r['learning_rate']:g}" for n, r in results.items() if n.startswith("qosora"))
    note = (
        f"{config['model']}, fine-tuned on {config['data']} for {steps}: cross-entropy of the answers to "
        f"{config['limit_test']} test questions. Learning rates {qlora['learning_rate']:g} (QLoRA) and "
        f"{qosora['learning_rate']:g} (of {rates}); one seed. "
        f"{conditions(found, file, 'torch', 'transformers', 'bitsandbytes')}"
    )
    return table(head, rows, note)


#: Experiments of the README's table: not the ablations, nor ways to store the base.
COMPARED = (
    "lora_r16", "rslora_r64", "dora_r16", "full", "qosora_r128_update2", "qosora_r128_update1_fast", "lora_r1", "vera",
    "ia3", "osora_16bit_r128", "qosora_r128",
)  # fmt: skip


def quality(folder: Path, file: str) -> str:
    """Return the table of what is learned, with its conditions."""
    methods = quality_page.read(folder)["gsm8k"]
    done = [method for name, method in methods.items() if name in COMPARED and method.finals]
    rows = [
        [
            method.label, f"{method.run['trained_parameters']:,}", method.loss.text(3),
            quality_page.behind(method, methods), method.forgotten.text(2), str(len(method.finals)),
        ]
        for method in done
    ]  # fmt: skip
    head = ["", "trained parameters", "test loss", "against QLoRA", "forgotten", "seeds"]
    rates = "each method at the best of its learning rates (OSoRA in 16 bits at that of r = 128)"
    model = f"Gemma 3 270M (Q4_K_M GGUF, dequantized) on GSM8K, {rates}"
    note = f"{model}. {quality_page.conditions(done)} [All figures](benchmarks/results/quality/README.md)."
    return table(head, rows, note)


def start(found: dict[str, Any], file: str) -> str:
    """Return the table of what quantization alone does, with its conditions."""
    results, config = found["results"], found["config"]
    names = {
        "nf4": "NF4",
        "nf4_blocks_of_32": "NF4, blocks of 32",
        "nf4_float32_absmax": "NF4, absmax in float32",
        "nf4_columns": "NF4, columns scaled",
        "int8": "int8, a scale a row",
    }
    for rank in config["ranks"]:
        names |= {
            f"qosora_r{rank}": f"qosora, r = {rank}, `--scale none`",
            f"qosora_r{rank}_columns": f"qosora, r = {rank}",
            f"qosora_r{rank}_calibrated": f"qosora, r = {rank}, calibrated",
        }
    rows = [
        [
            text,
            f"{row['bits_per_weight']:.2f}",
            *(_spread(row[kind]["kl_divergence"]) for kind in ("gsm8k", "openbookqa")),
        ]
        for name, text in names.items()
        for row in [results[name]]
    ]
    note = (
        f"{config['model']}, untrained, beside the unquantized model: KL divergence of the next token's distributions, "
        f"in nats, computed in float32, on {config['texts']} texts each of GSM8K and of OpenBookQA, of up to "
        f"{config['tokens']} tokens; mean and range over {config['draws']} draws of rounding errors. Calibrated on "
        "OpenBookQA's training set. int8 has twice the bits, and is the only one here that is nearer. "
        f"{conditions(found, file, 'torch', 'transformers', 'bitsandbytes')}"
    )
    return table(["", "bits per weight", "GSM8K", "OpenBookQA"], rows, note)


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def embeddings(found: dict[str, Any], file: str) -> str:
    """Return the table of what quantized embeddings do, with its conditions."""
    results, config = found["results"], found["config"]
    prefix = f"qosora_r{config['ranks'][0]}_columns"
    names = {
        prefix: "16 bits",
        f"{prefix}_embeddings_8bit": "`--embeddings 8bit`",
        f"{prefix}_embeddings_4bit": "`--embeddings 4bit`",
        f"{prefix}_embeddings_plain_nf4": "NF4 as they are",
    }
    kinds = ("gsm8k", "openbookqa")
    rows = [[text, *(_spread(results[name][kind]["kl_divergence"]) for kind in kinds)] for name, text in names.items()]
    note = (
        f"The same divergences of bases at r = {config['ranks'][0]} whose embeddings, which are the output layer, too, "
        f"are stored in different ways, cut to these texts' tokens. "
        f"{conditions(found, file, 'torch', 'transformers', 'bitsandbytes')}"
    )
    return table(["embeddings", "GSM8K", "OpenBookQA"], rows, note)


def export(found: dict[str, Any], file: str) -> str:
    """Return the table of losses of one adapter as it leaves in different ways."""
    stage, config = found["results"]["gsm8k"], found["config"]
    loss, sizes, rank = stage["loss"], stage["bytes"], stage["adapter_rank"]
    rows = [
        ["original, untrained", "", f"{loss['original_untrained']:.3f}"],
        ["base and adapter, in qosora", "", f"{loss['adapted']:.3f}"],
        ["merged onto dequantized", mib(sizes["dequantized"]), f"{loss['merged_onto_dequantized']:.3f}"],
        ["merged onto original", mib(sizes["original"]), f"{loss['merged_onto_original']:.3f}"],
    ]
    for name in sorted((n for n in sizes if n.startswith("lora_r")), key=lambda n: -int(n.removeprefix("lora_r"))):
        k = int(name.removeprefix("lora_r"))
        kind = "exact" if k == rank else f"reduced: {stage['rank_error'][name]:.0%} of ΔW lost"
        rows.append([f"LoRA on original, r = {k} ({kind})", mib(sizes[name]), f"{loss[f'{name}_on_original']:.3f}"])
    note = (
        f"{config['model']} fine-tuned on {config['data']} as above, all in bfloat16: cross-entropy of the answers to "
        f"{stage['questions']} test questions. {conditions(found, file)}"
    )
    return table(["", "size", "test loss"], rows, note)


def convert(found: dict[str, Any], file: str) -> str:
    """Return the table of conversion times and memory, with its conditions."""
    one, full, config = found["results"]["one_layer"], found["results"]["conversion"], found["config"]
    names = {
        "qosora": f"qosora, r = {config['rank']}: decomposed, quantized, errors measured",
        "pissa_niter_4": f"PEFT `pissa_niter_4`, r = {config['rank']}: decomposed, not quantized",
        "nf4": "bitsandbytes NF4 alone",
        "theory": "the SVD's matrix products and the quantization alone",
    }
    rows = [
        [label, f"{one['median_seconds'][method]:.1f} s", gib(one["peak_anonymous_bytes"][method])]
        for method, label in names.items()
    ]
    model = f"{config['shapes']}, {config['layers']} layers: `qosora quantize`"
    rows.append([model, f"{full['seconds'] / 60:.1f} min", gib(full["peak_anonymous_bytes"])])
    note = (
        f"One decoder layer of {config['shapes']} in bfloat16, median of {config['rounds']} runs in turns, and the "
        f"whole checkpoint ({found['results']['checkpoint']['bytes'] / 1e9:.1f} GB). Memory is the peak of anonymous "
        "resident memory of the process, Python and libraries included. "
        f"{conditions(found, file, *QLORA, threads=True)}"
    )
    return table(["", "time", "memory"], rows, note)


def memory(found: dict[str, Any], file: str) -> str:
    """Return the table of peaks of a training step, measured and planned, with its conditions."""
    rows = []
    for name, result in found["results"].items():
        kind, shape, tokens, mode = name.split("_")
        if kind == "measured":
            model, _, layers = shape.partition(":")
            what = f"measured on a CPU: {model}, {layers} layers, {tokens} tokens, {mode}"
            peaks = [result[method]["peak_bytes"] for method in ("qosora", "qlora")]
        else:
            what = f"planned for a GPU: {shape}, {tokens} tokens, {mode}"
            peaks = [result[f"{method}_allocated_bytes"] for method in ("qosora", "qlora")]
        rows.append([what, *map(gib, peaks), f"{peaks[0] / peaks[1]:.3f}"])
    config = found["config"]
    note = (
        f"Peak of live tensor bytes of a training step, batch size {config['batch_size']}, {config['precision']}, "
        f"qosora at r = {config['rank']} against PEFT's LoRA at r = {config['lora_rank']} on bitsandbytes NF4, with "
        "the same loss and attention; layers checkpointed, or all activations kept. Measured and planned CPU peaks "
        f"agree within {_worst_plan(found['results']):.1%}. {conditions(found, file, *QLORA)}"
    )
    return table(["", "qosora", "QLoRA", "ratio"], rows, note)


def plans(found: dict[str, Any], file: str) -> str:
    """Return the table of planned totals, with its conditions."""
    cards = (4, 6, 8, 12, 16, 24, 48, 80)
    fitted = ("qlora_offloading", "embeddings_4bit_offloading", "embeddings_4bit_host")
    rows = []
    for name, result in found["results"].items():
        model, _, tokens = name.rpartition("_")
        ways = ("qlora", "qosora", "embeddings_4bit", "embeddings_4bit_host")
        peaks = [result[way]["tensors"] for way in ways]
        fits = [next((c for c in cards if result[way]["in_all"] <= c * 2**30), None) for way in fitted]
        words = ["more than 80 GB" if card is None else f"{card} GB" for card in fits]
        *resident, host = map(gib, peaks)
        ratio = f"{peaks[2] / peaks[0]:.2f}"
        rows.append([f"{model}, {tokens} tokens", *resident, ratio, host, *words])
    head = [
        "", "QLoRA", "qosora", "`--embeddings 4bit`", "its ratio", "and `--base-on host`", "card for QLoRA",
        "for qosora", "with the base on the host",
    ]  # fmt: skip
    config = found["config"]
    note = (
        "Tensors at the peak of a step as planned, batch size 1, checkpointed, "
        f"qosora at r = {config['rank']} and PEFT's LoRA at r = {config['lora_rank']} on NF4. "
        f"The cards are the smallest of {', '.join(map(str, cards))} GB that hold such a step in all: QLoRA and qosora "
        "with activation offloading, qosora with embeddings in 4 bits, and without offloading where the base is on the "
        "host. That layers come from there as the plan has it was not measured on a GPU. "
        f"{conditions(found, file, *QLORA)}"
    )
    return table(head, rows, note)


def processes(found: dict[str, Any], file: str) -> str:
    """Return the table of ways to divide a run, with its conditions."""
    words = {"ddp": "the base whole in each", "fsdp": "`--strategy fsdp`", "host": "`--base-on host`"}
    rows = []
    for name, result in found["results"].items():
        method, way, count = name.split("_")
        several = int(count) > 1
        sizes = [mib(size) for size in (max(result["base_bytes"]), result["peak_rss_bytes"])]
        said = "both" if way == "host" and several else words[way] if several or way == "host" else "resident"
        row = f"{method}, {count} process{'es' * several}, {said}"
        rows.append([row, f"{result['difference']:.1e}", *sizes, f"{result['seconds']:.0f}"])
    config = found["config"]
    note = (
        f"A random model of Llama's kind ({config['layers']} layers of width {config['width']}), "
        f"{config['steps']} steps in float32 with the same examples in every step: the largest difference of a trained "
        "vector to that of one process with a resident base, relative to the vector's largest entry; the bytes of the "
        "frozen base that a process keeps between layers; the largest resident set of a process, Python and libraries "
        "included; seconds of the run, on two cores for all processes. "
        f"{conditions(found, file, 'torch', 'transformers', 'accelerate')}"
    )
    return table(["", "largest difference", "base in a process", "resident set", "seconds"], rows, note)


def growth(found: dict[str, Any], file: str) -> str:
    """Return the table of trained parameters, bits and errors by rank, with its conditions."""
    results = dict(found["results"])
    errors = results.pop("errors")
    ranks, blocks = errors["ranks"], errors["blocks_of_32"]

    def beside(error: float, nf4_error: float) -> str:
        return f"{100 * (error / nf4_error - 1):+.1f} %"

    rows = [
        [
            rank, f"{each['osora']:,}", f"{each['lora']:,}", f"{each['bits_per_weight']:.2f}",
            *(beside(at[rank]["error"], at[rank]["nf4_error"]) for at in ranks.values()),
        ]
        for rank, each in results.items()
    ]  # fmt: skip
    rivals = [beside(of["nf4_error"], next(iter(ranks[name].values()))["nf4_error"]) for name, of in blocks.items()]
    bits = next(iter(blocks.values()))["nf4_bits_per_parameter"]
    layers = next(iter(results.values()))["layers"]
    note = (
        f"The shapes of {found['config']['model']}, {layers} matrices: parameters that PEFT trains, and bits "
        "of the stored base for each weight of these matrices. Errors are those of weights of these shapes with "
        "random singular vectors and the stretched singular values of a middle layer of "
        f"{found['config']['spectrum_of']}, beside NF4's; NF4 in blocks of 32 takes {bits:.2f} bits and has "
        f"{' and '.join(rivals)}. "
        f"{conditions(found, file, 'torch', 'peft')}"
    )
    names = [f"error, `{name}`" for name in ranks]
    return table(["rank", "qosora trains", "LoRA trains", "bits a weight of the base", *names], rows, note)


def shares(found: dict[str, Any], file: str) -> str:
    """Return the table of what is decomposed of mixtures, with its conditions."""
    rows = [
        [
            f"`{name.partition('/')[2]}`", f"{each['parameters'] / 1e9:.1f}", f"{100 * each['share']:.1f} %",
            ", ".join(f"`{_short(path)}` {count / 1e6:,.0f}" for path, count in [*each["left"].items()][:2]),
        ]
        for name, each in found["results"].items()
    ]  # fmt: skip
    note = (
        "Part of the entries of all matrices but embeddings and output layer, in the shapes of the configuration class "
        f"(of DBRX in the published ones), without weights. {conditions(found, file, 'torch', 'transformers')}"
    )
    return table(["model type", "10⁹ parameters", "decomposed", "most of the rest, in 10⁶ entries"], rows, note)


def _short(path: str) -> str:
    """Return the end of a parameter's name that tells what it is."""
    return ".".join(path.removesuffix(".weight").split(".")[-2:])


def reward(found: dict[str, Any], file: str) -> str:
    """Return the table of reinforcement learning, with its conditions."""
    results, config = found["results"], found["config"]
    names = {"qosora": "qosora's vectors, r = 64", "lora_r16": "LoRA, r = 16, on NF4"}
    rows = []
    for name, words in names.items():
        runs = [run for key, run in results.items() if key.startswith(f"{name}_seed")]
        first, last = ([sum(run["rewards"][part]) / 10 for run in runs] for part in (slice(10), slice(-10, None)))
        shares = [f"{sum(s) / len(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in (first, last)]
        rows.append([words, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g}", *shares])
    note = (
        f"GRPO on the demo's task, {config['steps']} steps of {config['batch']} answers, 8 to each prompt, after "
        f"{config['warm_steps']} steps on examples, merged: the share of sampled answers that are right, mean and "
        f"range over {config['seeds']} seeds, at the best of {len(config['rates']['qosora'])} learning rates on the "
        f"first. {conditions(found, file, *QLORA, 'trl')}"
    )
    head = ["", "trained parameters", "learning rate", "right in the first 10 steps", "in the last 10"]
    return table(head, rows, note)


def reward_gsm8k(found: dict[str, Any], file: str) -> str:
    """Return the table of reinforcement learning on GSM8K, with its conditions."""
    results, config = found["results"], found["config"]
    names = {"qosora": "qosora's vectors, r = 128", "lora_r16": "LoRA, r = 16, on NF4"}
    before = results["before"]["right"]
    rows = [["before", "", "", "", "", *(f"{before[name]:.2f}" for name in ("sums", "number"))]]
    for name, words in names.items():
        for run in (run for key, run in results.items() if key.startswith(f"{name}_lr")):
            first, last = (sum(run["rewards"][part]) / 10 for part in (slice(10), slice(-10, None)))
            scores = [f"{run['right'][reward]:.2f}" for reward in ("sums", "number")]
            rows.append([words, f"{run['parameters']:,}", f"{run['rate']:g}", f"{first:.2f}", f"{last:.2f}", *scores])
    note = (
        f"Gemma 3 270M after {config['warm_steps']} steps on examples, merged; then {config['steps']} steps of GRPO on "
        f"{config['batch']} answers, 8 to each prompt, on questions of at most 64 tokens. An answer is worth the share "
        "of its sums that are right (examples/gsm8k_reward.py), and 1 more for the right number. One seed; greedy "
        f"answers to {config['asked']} held-out questions, before by qosora's base. "
        f"{conditions(found, file, *QLORA, 'trl')}"
    )
    head = ["", "trained parameters", "learning rate", "reward in the first 10 steps", "in the last 10"]
    return table([*head, "sums right, held out", "number right"], rows, note)


def _worst_plan(results: dict[str, Any]) -> float:
    """Return the largest relative difference of plan and measurement."""
    measured = [result for name, result in results.items() if name.startswith("measured")]
    return max(
        abs(result[method]["planned_over_measured"] - 1) for result in measured for method in ("qosora", "qlora")
    )


def _best(results: dict[str, Any], method: str) -> dict[str, Any]:
    """Return the run of a method, among those at several learning rates, with the lowest final loss."""
    return min((r for name, r in results.items() if name.startswith(method)), key=lambda r: _last(r["test_loss"]))


def _sizes(stage: dict[str, Any]) -> list[str]:
    return [f"{stage['trained_parameters']:,}", f"{stage['adapter_bytes'] / 2**20:.2f} MiB"]


def _losses(stage: dict[str, Any]) -> list[str]:
    losses = stage["test_loss"]
    return [f"{losses[min(losses, key=int)]:.3f}", f"{_last(losses):.3f}"]


def _last(losses: dict[str, float]) -> float:
    return losses[max(losses, key=int)]


TABLES: dict[str, tuple[str, Callable[[Any, str], str]]] = {
    "quality": ("quality", quality),
    "gsm8k": ("gsm8k_gemma3_270m.json", gsm8k),
    "start": ("start_gemma3_270m.json", start),
    "embeddings": ("start_embeddings_gemma3_270m.json", embeddings),
    "export": ("export_gemma3_270m.json", export),
    "convert": ("convert_llama2_7b.json", convert),
    "memory": ("memory_cpu.json", memory),
    "plans": ("plans.json", plans),
    "layer_step": ("layer_step_cpu.json", layer_step),
    "train_step": ("train_step_cpu.json", train_step),
    "mixture_step": ("mixture_step_cpu.json", mixture_step),
    "optimizer_step": ("optimizer_step_cpu.json", optimizer_step),
    "generate": ("generate_cpu.json", generate),
    "load": ("load_cpu.json", load),
    "gpu": ("gpu/summary.json", gpu),
    "launches": ("launches.json", launches),
    "processes": ("processes.json", processes),
    "reward": ("reward_cpu.json", reward),
    "reward_gsm8k": ("reward_gsm8k_cpu.json", reward_gsm8k),
    "growth": ("growth.json", growth),
    "shares": ("shares.json", shares),
}


def filled(text: str, root: str = "") -> str:
    """Return a page with its tables as the results make them.

    Args:
        text: Of the page.
        root: From its folder to that of the README.
    """

    def replaced(match: re.Match[str]) -> str:
        file, make = TABLES[match["name"]]
        where = ROOT / "benchmarks" / "results" / file
        found = where if where.is_dir() else json.loads(where.read_text(encoding="utf-8"))
        made = make(found, file).replace("](benchmarks/", f"]({root}benchmarks/")
        return f"{match[1]}{made}{match[3]}"

    return MARKED.sub(replaced, text)


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the tables are not up to date")
    args = parser.parse_args()
    changed = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = filled(old, "" if page.parent == ROOT else "../")
        if new != old:
            changed.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    print(f"{', '.join(changed)}: run python benchmarks/tables.py" if args.check and changed else "up to date")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
