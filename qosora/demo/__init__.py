"""`qosora demo`: the whole chain on a tiny language model that comes with the package.

Decompose, evaluate, fine-tune, evaluate again, export, and compare the export, loaded by plain transformers, with the
adapted model. The model was trained on a made-up little world (`examples/make_demo_model.py`); the task, filling in a
delivery ticket from a letter, is new to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qosora.base import ConversionReport, load_model, load_tokenizer, quantize
from qosora.base.describe import describe
from qosora.config import QosoraConfig
from qosora.data import load_records
from qosora.export import export_merged
from qosora.inference import EvalResult, evaluate
from qosora.training import TrainConfig, train

__all__ = ["DemoResult", "assets", "run_demo"]

#: Rank 64, or half the smaller dimension where that is less: the key and value projections are 64 x 128.
CONFIG: dict[str, Any] = {"rank": 64, "rank_pattern": {"k_proj|v_proj": 32}}
TRAINING: dict[str, Any] = {
    "max_steps": 100,
    "batch_size": 16,
    "learning_rate": 2e-2,
    "warmup_ratio": 0.1,
    "save_steps": 50,
}
#: The longest expected ticket has 8 tokens.
ANSWER_TOKENS = 14


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        conversion: Errors of the decomposition.
        before: The base on the held-out data.
        after: The adapted model on the same.
        trainable_parameters: Entries of all vectors.
        adapter_bytes: Size of the adapter's file.
        export_bytes: Size of the exported float32 weights.
        largest_logit_difference: Between the adapted model and the export, over the held-out prompts.
        largest_logit: Largest absolute logit there, for scale.
        seconds: By step.
    """

    conversion: ConversionReport
    before: EvalResult
    after: EvalResult
    trainable_parameters: int
    adapter_bytes: int
    export_bytes: int
    largest_logit_difference: float
    largest_logit: float
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "conversion": self.conversion.to_dict()}


def assets() -> Any:
    """Return the folder of the model and its data, as a context manager that gives a path."""
    return as_file(files("qosora.demo") / "assets")


def run_demo(output_dir: str | Path, *, step: Callable[[str], None] = lambda text: None) -> DemoResult:
    """Run the chain, and leave base, adapter and export in folders of these names.

    Args:
        output_dir: Where to; earlier results of a demo there are replaced.
        step: Called with the name of each step as it begins.
    """
    output_dir = Path(output_dir)
    base, adapter, export = (output_dir / name for name in ("base", "adapter", "export"))
    seconds: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        step(name)
        start = time.perf_counter()
        result = action()
        seconds[name] = time.perf_counter() - start
        return result

    with _one_thread(), assets() as source:
        test = source / "test.jsonl"
        conversion = timed(
            "decompose", lambda: quantize(source / "model", base, QosoraConfig(**CONFIG), overwrite=True)
        )
        before = timed("evaluate the base", lambda: _evaluate(base, test))
        config = TrainConfig(
            model=str(base),
            data=str(source / "train.jsonl"),
            output_dir=str(adapter),
            precision="fp32",
            gradient_checkpointing=False,
            overwrite=True,
            **TRAINING,
        )
        timed("train", lambda: train(config))
        after = timed("evaluate the adapter", lambda: _evaluate(adapter, test))
        exported = timed("export", lambda: export_merged(base, export, adapter, dtype="float32", overwrite=True))
        difference, largest = timed("compare", lambda: _compare(adapter, export, test))
    found = describe(adapter)
    return DemoResult(
        conversion=conversion,
        before=before,
        after=after,
        trainable_parameters=found["adapter_parameters"],
        adapter_bytes=found["file_bytes"],
        export_bytes=exported.total_bytes,
        largest_logit_difference=difference,
        largest_logit=largest,
        seconds=seconds,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core.

    The model's operations are too small to share, and on a busy machine the threads that share one wait for one
    another: 10 seconds a step were measured, in place of 0.13.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _evaluate(model: Path, data: Path) -> EvalResult:
    return evaluate(
        load_model(model, dtype=torch.float32),
        load_tokenizer(model),
        data,
        exact_match=True,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=32,
        samples=4,
    )


@torch.no_grad()
def _compare(adapter: Path, export: Path, data: Path) -> tuple[float, float]:
    """Return the largest difference of logits, and the largest logit, over some prompts."""
    adapted = load_model(adapter, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(export).eval().to(adapted.device)
    tokenizer = load_tokenizer(export)
    difference = largest = 0.0
    for row in load_records(data, limit=16).rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"].to(adapted.device)
        a, b = adapted(input_ids=ids).logits, plain(input_ids=ids).logits
        difference = max(difference, float((a - b).abs().max()))
        largest = max(largest, float(b.abs().max()))
    return difference, largest
