"""The README's tables of times: a layer, a step, an optimizer, generation, loading."""

from __future__ import annotations

from typing import Any

from page import QLORA, conditions, count, gib, mib, milliseconds, table

_OPTIMIZERS = {
    "packed-32bit": "qosora, packed, 32 bits",
    "packed-8bit": "qosora, packed, 8 bits",
    "bitsandbytes-32bit": "bitsandbytes AdamW, 32 bits",
    "bitsandbytes-8bit": "bitsandbytes AdamW, 8 bits",
    "torch-fused": "torch AdamW, fused",
    "torch-foreach": "torch AdamW, foreach",
}


def layer_step(found: dict[str, Any], file: str) -> str:
    """Return the table of times of a decoder layer's linear layers, with its conditions."""
    config = found["config"]
    methods = {
        "qosora-128": "qosora, r = 128",
        "lora": f"LoRA, r = {config['lora_rank']}",
        "dora": f"DoRA, r = {config['lora_rank']}",
        "vera": f"VeRA, r = {config['vera_rank']}",
    }
    rows = [
        [
            f"{model}, {count(tokens, 'token')}",
            milliseconds(times["nf4"]),
            *(f"{times[m] / times['nf4']:.2f}" for m in methods),
        ]
        for model in config["layers"]
        for tokens, times in layer_times(found, model).items()
    ]
    sizes = {name: int(name.rpartition("_")[2]) for name in found["results"]}
    least = min(1024, max(sizes.values()))
    single = [found["results"][name]["qosora-128"]["ratio"]["median"] for name, size in sizes.items() if size >= least]
    note = (
        f"Forward and backward of the linear layers of one decoder layer in {config['dtype']}: the time of frozen NF4 "
        f"layers, and the others' relative to it, medians of {config['rounds']} rounds in turns. Layer by layer and at "
        f"{least:,} and more tokens, qosora takes {min(single):.2f} to {max(single):.2f} times as long as NF4. "
        f"{conditions(found, file, *QLORA, threads=True)}"
    )
    return table(["", "frozen NF4", *methods.values()], rows, note)


def layer_times(found: dict[str, Any], model: str) -> dict[int, dict[str, float]]:
    """Return the seconds of one decoder layer's linear layers, by tokens and method; what counts is their ratio.

    They are NF4's times the ratios in the same round, so that what slows the machine down falls on all alike.
    """
    results, counts = found["results"], found["config"]["layers"][model]
    sizes = sorted({int(name.rpartition("_")[2]) for name in results})
    stages = {tokens: [(results.get(f"{shape}_{tokens}"), n) for shape, n in counts.items()] for tokens in sizes}
    return {
        tokens: {
            method: sum(n * stage["nf4"]["seconds"]["median"] * stage[method]["ratio"]["median"] for stage, n in parts)
            for method in parts[0][0]
            if method != "wall_seconds"
        }
        for tokens, parts in stages.items()
        if all(stage for stage, _ in parts)
    }


def train_step(found: dict[str, Any], file: str) -> str:
    """Return the table of time and peak of a training step, with its conditions."""
    config, methods, rows = found["config"], ("qosora", "qlora"), []
    for name, stage in found["results"].items():
        shape, _, how = name.split("_")
        model, _, layers = shape.partition(":")
        part = f", {count(int(layers), 'layer')}" if layers else ""
        where = f"{model}{part}, {stage['batch_size']} × {count(stage['tokens'], 'token')}, {how}"
        seconds = [milliseconds(stage[method]["seconds"]["median"]) for method in methods]
        ratio, peaks = stage["qosora"]["ratio"], [stage[method]["peak_bytes"] for method in methods]
        spread = f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
        rows.append([where, *seconds, spread, *map(gib, peaks), f"{peaks[0] / peaks[1]:.3f}"])
    note = (
        f"A whole training step in {config['precision']}: forward, TRL's chunked loss, backward, clipping, optimizer; "
        f"qosora at r = {config['rank']} against PEFT's LoRA at r = {config['lora_rank']} on bitsandbytes NF4. Medians "
        f"of {config['rounds']} rounds in turns, their ratio in the same round (10th to 90th percentile), and the peak "
        f"of {'allocated bytes' if found['device']['gpu'] else 'live tensor bytes'}. "
        f"{conditions(found, file, *QLORA, threads=True)}"
    )
    head = [f"{what}, {label}" for what in ("time", "peak") for label in ("qosora", "QLoRA", "ratio")]
    return table(["", *head], rows, note)


def mixture_step(found: dict[str, Any], file: str) -> str:
    """Return the table of a mixture's training step, with its conditions."""
    config, rows = found["config"], []
    methods = {
        "qosora, expert by expert": "qosora, experts one by one",
        "qosora, together": "qosora, experts together",
        "qlora": f"PEFT, LoRA r = {config['lora_rank']}",
    }
    for stage in found["results"].values():
        for method, label in methods.items():
            ratio = stage[method]["ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
            seconds, peak = milliseconds(stage[method]["seconds"]["median"]), gib(stage[method]["peak_bytes"])
            rows.append([f"{count(stage['tokens'], 'token')}: {label}", seconds, spread, peak])
    note = (
        f"A training step of one decoder layer of {config['shape']} with a small vocabulary, in {config['precision']}, "
        f"all activations kept; qosora at r = {config['rank']} against PEFT's LoRA on linear layers in NF4 and on the "
        "stacked experts, which bitsandbytes leaves in 16 bits. Medians of rounds in turns, the ratio to PEFT in the "
        f"same round (10th to 90th percentile), and the peak of live tensor bytes. "
        f"{conditions(found, file, *QLORA, threads=True)}"
    )
    return table(["", "time", "ratio", "peak"], rows, note)


def optimizer_step(found: dict[str, Any], file: str) -> str:
    """Return the table of times of an optimizer's step, with its conditions."""
    config, stages = found["config"], [found["results"][name] for name in ("qosora", "lora")]
    rows = [[label, *(cell for stage in stages for cell in _cells(stage, name))] for name, label in _OPTIMIZERS.items()]
    sets = ("qosora's vectors", "LoRA's matrices")
    head = ["", *(column for name in sets for column in (f"{name}: update", "with gradients", "states"))]
    numbers = " and ".join(f"{stage['parameters']:,} parameters in {stage['tensors']} tensors" for stage in stages)
    rounds = " and ".join(str(stage["step"]["packed-32bit"]["seconds"]["count"]) for stage in stages)
    note = (
        f"What trains in {config['shape']}: qosora's vectors at r = {config['rank']} and LoRA's matrices at r = "
        f"{config['lora_rank']}, {numbers}. The update alone, and with what comes before and after it (gradients "
        "brought to where the optimizer wants them, `zero_grad`); in brackets relative to bitsandbytes' 32-bit AdamW; "
        f"medians of {rounds} rounds in turns. LoRA's matrices are in bfloat16, and so are torch's states of them. "
        f"{conditions(found, file, 'torch', 'bitsandbytes', threads=True)}"
    )
    return table(head, rows, note)


def _cells(stage: dict[str, Any], name: str) -> list[str]:
    """Return times and states of one optimizer."""
    timings, memory = [stage[part][name] for part in ("step", "all")], stage["memory"][name]
    kernels = f", {memory['kernels']} kernels" if "kernels" in memory else ""
    return [
        *(f"{milliseconds(timing['seconds']['median'])} ({timing['ratio']['median']:.2f})" for timing in timings),
        f"{mib(memory['state_bytes'])}{', paged' if memory['paged_bytes'] else ''}{kernels}",
    ]


def generate(found: dict[str, Any], file: str) -> str:
    """Return the table of tokens per second, with its conditions."""
    config = found["config"]
    methods = {
        "nf4": "NF4 without adapter",
        "lora": f"LoRA, r = {config['lora_rank']}, on NF4",
        "qosora": f"qosora, r = {config['rank']}",
        "qosora-merged": "the same, merged",
    }
    rows = [
        [
            f"{stage['shape']}, {count(stage['layers'], 'layer')}, batch of {stage['batch_size']}: {label}",
            *(f"{stage['tokens_per_second'][part][method]:.4g}" for part in ("prefill", "decode")),
        ]
        for stage in found["results"].values()
        for method, label in methods.items()
    ]
    note = (
        f"Tokens per second of greedy generation, {config['precision']}, KV cache: reading prompts of "
        f"{config['prompt_tokens']:,} tokens, and writing {config['new_tokens']} tokens one by one; medians of "
        f"{config['rounds']} rounds in turns. {conditions(found, file, *QLORA, threads=True)}"
    )
    return table(["", "prefill", "decode"], rows, note)


def load(found: dict[str, Any], file: str) -> str:
    """Return the table of times and memory of loading, with its conditions."""
    config, stage = found["config"], found["results"]["load"]
    labels = {
        "qosora": ("qosora", f"qosora base, r = {config['rank']}"),
        "nf4": ("nf4", "NF4 checkpoint"),
        "nf4-on-the-fly": ("16-bit", "16-bit checkpoint, quantized to NF4"),
    }
    on_gpu = found["device"]["gpu"] is not None
    rows = []
    for way, (checkpoint, label) in labels.items():
        result = stage["ways"][way]
        seconds = [result["seconds"][part]["median"] for part in ("load", "both")]
        memory = ["resident", "anonymous", *["allocated"] * on_gpu]
        sizes = [stage["bytes"][checkpoint], *(result[f"peak_{kind}_bytes"] for kind in memory)]
        rows.append([label, *(f"{value:.2f} s" for value in seconds), *map(gib, sizes)])
    head = ["", "load", "and adapter", "file", "peak memory", "without mapped files", *["GPU memory"] * on_gpu]
    note = (
        f"{stage['shape']}, {count(stage['layers'], 'layer')}, by `from_pretrained` in a fresh process, with the files "
        f"in the page cache; all weights are read once. Medians of {config['rounds']} rounds in turns. Adapters are "
        f"OSoRA and LoRA at r = {config['lora_rank']}. Memory is the process's, Python and libraries included. "
        f"{conditions(found, file, 'torch', 'transformers', 'bitsandbytes', threads=True)}"
    )
    return table(head, rows, note)
