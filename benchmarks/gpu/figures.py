"""What `run_all.py` shows of each part's results, and what is wanted of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
Results = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A line of the table; `ok` is None where nothing is wanted."""

    name: str
    value: str
    wanted: str = ""
    ok: bool | None = None


def tests(results: Results) -> Iterator[Figure]:
    """Counts, the tests that failed, and those that show that optimizer states are paged and stay so."""
    counts = {outcome: len(names) for outcome, names in results.items()}
    value = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    yield Figure("tests marked gpu", value, "none fails", not counts["failed"])
    for name in results["failed"]:
        yield Figure(name, "failed", "passes", False)
    paged = {outcome: sum("paged" in name for name in names) for outcome, names in results.items()}
    if any(paged.values()):
        value = f"{paged['passed']} of {sum(paged.values())} tests pass"
        yield Figure("paged states, and after resume", value, "all", paged["passed"] == sum(paged.values()))


def memory(results: Results) -> Iterator[Figure]:
    """Planned beside measured, QLoRA beside qosora, and the constants that plans assume."""
    cuda: list[dict[str, int]] = []
    kernels: set[str] = set()
    for stage, result in results.items():
        if not stage.startswith("measured_"):
            continue
        mine, rival = result["qosora"], result["qlora"]
        name = " ".join(stage.split("_")[1:3])
        for method, found in (("qosora", mine), ("QLoRA", rival)):
            ratio = found["planned_over_measured"]
            value = f"{ratio:.3f} ({_gib(found['planned_bytes'])} of {_gib(found['peak_bytes'])})"
            ok = abs(ratio - 1) <= 0.03 if method == "qosora" else None
            yield Figure(
                f"{name}: planned over measured, {method}", value, "0.97 to 1.03" if ok is not None else "", ok
            )
        ratio = mine["peak_bytes"] / rival["peak_bytes"]
        yield Figure(f"{name}: peak", f"{_gib(mine['peak_bytes'])}, {ratio:.3f}x QLoRA's", "below 1x", ratio < 1)
        cuda += [mine["cuda"]] if mine["cuda"] else []
        kernels |= {op.removeprefix("aten::_scaled_dot_product_") for op in mine["attention"]}
    if cuda:
        yield Figure("attention", ", ".join(sorted(kernels)), "flash is assumed")
        overheads = sorted(found["reserved_bytes"] / found["allocated_bytes"] - 1 for found in cuda)
        yield Figure("reserved over allocated", f"{overheads[0]:.1%} to {overheads[-1]:.1%}", "12% is assumed")
        for key, assumed in (
            ("context_bytes", "900 MiB on H100, H200 and B200, else 450"),
            ("workspace_bytes", "64 MiB on Hopper, else 16"),
        ):
            values = sorted(found[key] / 2**20 for found in cuda)
            name = (
                key.replace("_bytes", "").replace("workspace", "cuBLAS workspaces").replace("context", "CUDA context")
            )
            yield Figure(name, f"{values[0]:.0f} to {values[-1]:.0f} MiB", f"{assumed} assumed")


def train(results: Results) -> Iterator[Figure]:
    """Tokens per second and peak against QLoRA's."""
    for stage, result in results.items():
        for method, ratios in result["over_qlora"].items():
            found, faster, smaller = result[method], ratios["tokens_per_second"], ratios["peak_bytes"]
            name = f"{stage.split('_')[0]} {result['batch_size']}x{result['tokens']}, {method}"
            value = f"{found['tokens_per_second']:,.0f}, {faster:.2f}x QLoRA's"
            yield Figure(f"{name}: tokens/s", value, "1.2x", faster >= 1.2)
            if method.endswith("-compiled"):
                value = f"{result['graphs']}, {result['graph_breaks']} breaks"
                yield Figure(f"{name}: graphs", value, "no breaks", result["graphs"] > 0 and not result["graph_breaks"])
            if smaller is not None:
                value = f"{_gib(found['peak_bytes'])}, {smaller:.2f}x QLoRA's"
                yield Figure(f"{name}: peak", value, "0.8x", smaller <= 0.8)


def limits(results: Results) -> Iterator[Figure]:
    """Whether it trains."""
    for stage, result in results.items():
        shape, batch, size = stage.split("_")
        used = max((step.get("device_used_bytes", step.get("peak_bytes", 0)) for step in result["steps"]), default=0)
        value = f"trains, {_gib(used)} in use" if result["fits"] else "out of memory"
        yield Figure(f"{shape} {batch} in {size}", value, "trains", result["fits"])


def context(results: Results) -> Iterator[Figure]:
    """The longest sequence; what was found so far if the search has not ended."""
    probes = {int(stage.split("_")[2]): found for stage, found in results.items() if stage.startswith("probe_")}
    longest = max((length for length, found in probes.items() if found["fits"]), default=0)
    limit = max((found["limit_bytes"] for found in probes.values()), default=0)
    yield Figure(
        f"longest context in {_gib(limit)} beside the CUDA context", f"{longest:,} tokens", "80,000", longest >= 80_000
    )
    for stage, result in results.items():
        if stage.startswith("context_") and "planned_bytes" in result:
            ratio = result["planned_bytes"] / result["peak_bytes"]
            yield Figure("planned over measured there", f"{ratio:.3f}", "0.97 to 1.03", abs(ratio - 1) <= 0.03)


def layer(results: Results) -> Iterator[Figure]:
    """Time of all layers of each number of tokens against the frozen NF4 layer's."""
    times: dict[int, dict[str, float]] = {}
    for stage, result in results.items():
        total = times.setdefault(int(stage.rpartition("_")[2]), {})
        for method, found in result.items():
            if method != "wall_seconds":
                total[method] = total.get(method, 0) + found["seconds"]["median"]
    for tokens, total in times.items():
        mine, rival = (total[method] / total["nf4"] for method in ("qosora-128", "lora"))
        ok = mine <= 1.10 and mine < rival if tokens >= 1024 else None
        yield Figure(
            f"{tokens} tokens, qosora r=128 over frozen NF4", f"{mine:.3f}, LoRA {rival:.3f}",
            "1.10, below LoRA" if tokens >= 1024 else "", ok,
        )  # fmt: skip


def optimizer(results: Results) -> Iterator[Figure]:
    """The packed step against tensor by tensor."""
    for what in ("step", "all"):
        timing = results["qosora"][what]["packed-32bit"]
        ratio, value = timing["ratio"]["median"], timing["seconds"]["median"]
        text = f"{value * 1e6:.0f} us, {ratio:.3f}x bitsandbytes'"
        yield Figure(f"packed AdamW of qosora's vectors, {what}", text, "below 1x", ratio < 1)


def generate(results: Results) -> Iterator[Figure]:
    """Tokens per second against PEFT's LoRA."""
    for stage, result in results.items():
        for phase in ("prefill", "decode"):
            rate, ratio = result["tokens_per_second"][phase]["qosora"], result[phase]["qosora"]["ratio"]["median"]
            value = f"{rate:,.0f}, {1 / ratio:.2f}x LoRA's"
            yield Figure(f"{stage.replace('_', ', batch ')}: {phase}, tokens/s", value, "1x", ratio <= 1)


def load(results: Results) -> Iterator[Figure]:
    """Seconds to load a base with its adapter."""
    ways = results["load"]["ways"]
    seconds = {way: found["seconds"]["both"]["median"] for way, found in ways.items()}
    text = ", ".join(f"{way} {value:.1f}" for way, value in seconds.items())
    least = seconds["nf4-on-the-fly"]
    yield Figure(f"{results['load']['layers']} layers, s", text, "below nf4-on-the-fly", seconds["qosora"] < least)


def convert(results: Results) -> Iterator[Figure]:
    """Seconds of a decoder layer and of a checkpoint."""
    if "one_layer" in results:
        yield Figure("one decoder layer, s", f"{results['one_layer']['median_seconds']['qosora']:.2f}")
    if "conversion" in results:
        found, layers = results["conversion"], results["checkpoint"]["layers"]
        value = f"{found['seconds']:.1f}, {found['decomposing_seconds'] / layers:.2f} a layer"
        yield Figure(f"checkpoint of {layers} layers, s", value)


def kernels(results: Results) -> Iterator[Figure]:
    """Speed of each fused kernel against the plain code, over all shapes and ranks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for stage, result in results.items():
        groups.setdefault(re.split(r"_\d+x\d+", stage)[0], []).append(result)
    for name, found in groups.items():
        speedups = sorted(result["device_speedup"] for result in found if "device_speedup" in result)
        if speedups:
            best = max(result["gb_per_second"]["fused"] for result in found)
            value = f"{speedups[0]:.2f}x to {speedups[-1]:.2f}x, at best {best:,.0f} GB/s"
            yield Figure(f"{name}: speed of the fused kernel", value, "above 1x", speedups[0] > 1)
        else:
            difference = max(result["relative_difference"] for result in found)
            yield Figure(f"{name}: difference from the plain code", f"{difference:.1e}")


@dataclass(frozen=True)
class Claim:
    """Something that the README says, or should be able to say.

    Attributes:
        text: What.
        what: What the values are.
        parts: In whose results it shows.
        values: Of such results; none where they do not show it.
        least: That a value may be.
        most: Likewise.
    """

    text: str
    what: str
    parts: tuple[str, ...]
    values: Callable[[Results], Iterator[float]]
    least: float = -math.inf
    most: float = math.inf


def _passed(mark: str = "") -> Callable[[Results], Iterator[float]]:
    """Return a function that yields the share of tests that pass, of those with a text in their name."""

    def values(results: Results) -> Iterator[float]:
        passed, failed = (sum(mark in name for name in results[outcome]) for outcome in ("passed", "failed"))
        if passed or failed:
            yield passed / (passed + failed)

    return values


def _fits(size: str) -> Callable[[Results], Iterator[float]]:
    return lambda results: (float(found["fits"]) for name, found in results.items() if name.endswith(f"_{size}"))


def _of_qlora(what: str) -> Callable[[Results], Iterator[float]]:
    return lambda results: (
        ratios[what] for found in results.values() for ratios in found["over_qlora"].values() if ratios[what]
    )


def _planned(results: Results) -> Iterator[float]:
    return (found["qosora"]["planned_over_measured"] for name, found in results.items() if "measured" in name)


def _context(results: Results) -> Iterator[float]:
    return (found["longest"] for name, found in results.items() if name.startswith("context_"))


def _of_lora(phase: str) -> Callable[[Results], Iterator[float]]:
    return lambda results: (1 / found[phase]["qosora"]["ratio"]["median"] for found in results.values())


def _speedups(results: Results) -> Iterator[float]:
    """Of kernels that run: more rows than a few take the plain code."""
    return (
        found["device_speedup"]
        for name, found in results.items()
        if "device_speedup" in found and not name.startswith("add_low_rank_16")
    )


CLAIMS = (
    Claim("all tests marked gpu pass", "share that passes", ("tests", "kernel-tests"), _passed(), least=1),
    Claim("optimizer states are paged, and after resume", "share that passes", ("tests",), _passed("paged"), least=1),
    Claim("trains a 7B within 8 GiB", "share that trains", ("limits",), _fits("8GiB"), least=1),
    Claim("trains a 7B and an 8B within 24 GiB, batch 4", "share that trains", ("limits",), _fits("24GiB"), least=1),
    Claim("80,000 tokens of an 8B within 24 GiB", "longest", ("context",), _context, least=80_000),
    Claim("plans are within 3 %", "planned over measured", ("memory",), _planned, 0.97, 1.03),
    Claim("less memory than QLoRA", "peak over QLoRA's", ("train",), _of_qlora("peak_bytes"), most=1),
    Claim("at least QLoRA's tokens/s", "over QLoRA's", ("train",), _of_qlora("tokens_per_second"), least=1),
    Claim("decodes at least as fast as LoRA on NF4", "over LoRA's", ("generate",), _of_lora("decode"), least=1),
    Claim("reads prompts at least as fast", "over LoRA's", ("generate",), _of_lora("prefill"), least=1),
    Claim("the fused kernels are faster", "over the plain code's speed", ("kernels",), _speedups, least=1),
)


def verdicts(results: Mapping[str, Results]) -> Iterator[dict[str, str]]:
    """Judge all claims.

    Args:
        results: Of the parts that were run, by name.

    Yields:
        The claim, "holds", "fails" or "not run", and the range of what decides.
    """
    for claim in CLAIMS:
        try:
            values = [float(value) for part in claim.parts for value in claim.values(results[part])]
        except (LookupError, TypeError, AttributeError):  # not run, or ended before it had them
            values = []
        holds = all(claim.least <= value <= claim.most for value in values)
        low, high = (f"{edge:,.5g}" for edge in (min(values, default=0), max(values, default=0)))
        span = low if low == high else f"{low} to {high}"
        yield {
            "claim": claim.text,
            "verdict": "not run" if not values else "holds" if holds else "fails",
            "measured": f"{claim.what}: {span}" if values else "",
        }


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
