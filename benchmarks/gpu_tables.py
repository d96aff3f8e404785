"""What the README says of the GPU: a table of training steps, and how many kernels one launches."""

from __future__ import annotations

from typing import Any

from page import QLORA, conditions, count, gib, table


def gpu(found: dict[str, Any], file: str) -> str:
    """Return the table of speed and memory of training steps, with what else was measured below it."""
    parts = {name: part["record"] for name, part in found["parts"].items()}
    train, memory = parts["train"], parts["memory"]
    plans = {_step(name, memory["config"]["batch_size"]): stage for name, stage in memory["results"].items()}
    steps = {_step(name): stage for name, stage in train["results"].items()}
    rows = [
        [
            f"{shape}, {batch} × {count(tokens, 'token')}",
            *_speed(steps.get((shape, batch, tokens))),
            *_peaks(steps.get((shape, batch, tokens)) or plans[shape, batch, tokens]),
            _plan(plans.get((shape, batch, tokens))),
        ]
        for shape, batch, tokens in sorted({**steps, **plans})
    ]
    config = train["config"]
    note = (
        f"A training step in {config['precision']} with random weights, layers checkpointed; qosora at r = "
        f"{config['rank']} against PEFT's LoRA at r = {config['lora_rank']} on bitsandbytes NF4, with the same loss "
        f"and attention. Tokens per second: medians of {config['rounds']} rounds in turns, and their ratio in the same "
        "round (10th to 90th percentile). Peak of allocated bytes, and the planned one over it where that was "
        "compared. "
        f"{_limits(parts['limits'])} {_generation(parts['generate'])} {_tests(parts)} "
        f"{conditions(train, file, *QLORA)}"
    )
    head = [f"{what}, {label}" for what in ("tokens/s", "peak") for label in ("qosora", "QLoRA", "ratio")]
    return table(["", *head, "planned / measured"], rows, note)


def _step(name: str, batch: int | None = None) -> tuple[str, int, int]:
    """Return shape, batch size and tokens of a stage: llama-2-7b_4x2048_checkpointed, measured_llama-2-7b_2048_…."""
    *_, shape, size, _ = name.split("_")
    rows, _, tokens = size.rpartition("x")
    return shape, batch or int(rows), int(tokens)


def _speed(stage: dict[str, Any] | None) -> list[str]:
    if stage is None:
        return ["", "", ""]
    rates = [f"{stage[method]['tokens_per_second']:,.0f}" for method in ("qosora", "qlora")]
    return [*rates, _faster(stage["qosora"]["ratio"])]


def _faster(ratio: dict[str, float]) -> str:
    """Return how many times as fast something is, from its time relative to another's."""
    return f"{1 / ratio['median']:.2f} ({1 / ratio['p90']:.2f} to {1 / ratio['p10']:.2f})"


def _peaks(stage: dict[str, Any]) -> list[str]:
    mine, rival = (stage[method]["peak_bytes"] for method in ("qosora", "qlora"))
    return [gib(mine), gib(rival), f"{mine / rival:.3f}"]


def _plan(stage: dict[str, Any] | None) -> str:
    return "" if stage is None else f"{stage['qosora']['planned_over_measured']:.3f}"


def _limits(record: dict[str, Any]) -> str:
    tries = []
    for name, stage in record["results"].items():
        shape, size, limit = name.split("_")
        batch, tokens = map(int, size.split("x"))
        used = max((step.get("device_used_bytes", 0) for step in stage["steps"]), default=0)
        how = f"trains ({gib(used)} in use)" if stage["fits"] else "does not train"
        tries.append(f"within {limit.replace('GiB', ' GiB')} {shape}, {batch} × {count(tokens, 'token')}, {how}")
    return f"In a process that may take no more, CUDA's context included: {'; '.join(tries)}."


def _generation(record: dict[str, Any]) -> str:
    stage, *_ = record["results"].values()
    speeds = [f"{phase} {_faster(stage[phase]['qosora']['ratio'])}" for phase in ("prefill", "decode")]
    return (
        f"Greedy generation with {stage['shape']}, batch of {stage['batch_size']}, of LoRA's speed on NF4: "
        f"{' and '.join(speeds)}, medians of {record['config']['rounds']} rounds."
    )


def _tests(parts: dict[str, Any]) -> str:
    results = [parts[name]["results"] for name in ("tests", "kernel-tests")]
    passed, failed = (sum(len(found[outcome]) for found in results) for outcome in ("passed", "failed"))
    return f"Of {passed + failed} tests marked `gpu` {'all' if not failed else passed} pass."


def launches(found: dict[str, Any], file: str) -> str:
    """Return a sentence on the kernels that a decoder layer launches."""
    mixture = found["config"]["mixture"]
    counts, of_mixture = (
        [found["results"][f"{name}_checkpointed"]["launches"] for name in names]
        for names in (("qosora", "qosora-plain", "qlora"), (f"{mixture}_qosora", f"{mixture}_qosora-alone"))
    )
    return (
        f"A checkpointed decoder layer of {found['config']['shape']} takes {counts[0]} kernel launches in a training "
        f"step, {counts[1]} with the plain code, and {counts[2]} in QLoRA; one of {mixture} takes "
        f"{of_mixture[0]:,} with its experts together, and {of_mixture[1]:,} with one after the other; counted "
        f"on the meta device ({found['date']}; [all figures](benchmarks/results/{file})).\n"
    )
