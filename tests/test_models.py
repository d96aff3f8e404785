"""A sample of every kind of model, through all stages of the sweep over transformers' architectures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "models" / "run_models.py"
#: Of language models those whose checkpoints or code are odd: weights in parts of other tensors, under other names,
#: changed in place, a tied output layer after a list of projections; and mixtures.
SAMPLE = [
    "causal/hrm_text", "causal/inkling2_text", "causal/rwkv", "causal/gemma3n_text", "causal/laguna",
    "classifier/modernbert", "classifier/funnel", "tagger/bert", "seq2seq/t5", "speech/whisper", "vision/llava",
]  # fmt: skip


@pytest.mark.slow
def test_a_sample_of_each_kind_comes_through(tmp_path: Path):
    command: list[str | Path] = [sys.executable, SCRIPT, "--output", tmp_path / "models.json", "--only", *SAMPLE]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "models.json").read_text(encoding="utf-8"))["models"]
    assert set(found) == set(SAMPLE)
    ends = {key: one.get("failed") or one.get("refused") for key, one in found.items()}
    assert not {key: end for key, end in ends.items() if end}
    assert all(one["passed"][-1] == "lora" for one in found.values())
