"""What is planned for bases with a scale is what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_base
from transformers import LlamaConfig

from qosora.config import QosoraConfig
from qosora.memory.options import Batch, StepOptions
from qosora.memory.predict import TracedModel
from qosora.memory.profile import profile

LLAMA = LlamaConfig(
    num_hidden_layers=10, vocab_size=512, hidden_size=64, intermediate_size=160, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, head_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "llama", config=QosoraConfig(rank=8, scale="columns"))


@pytest.mark.filterwarnings("ignore:.*runs on the CPU")
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "gradient_checkpointing": False, "batch_size": 3},
        {"tile_length": 16},
        {"packing": True, "seq_len": 24, "vectors": "o"},
    ],
)
def test_planned_equals_measured(base: Path, options: dict[str, Any]):
    found = profile(base, **{"batch_size": 2, "seq_len": 48, "steps": 1, **options})
    assert found.planned is not None
    assert found.planned.phases == pytest.approx(found.live.phases, rel=0.01)
    assert found.planned.rows["factors"] == found.live.rows["factors"]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": False, "device": "cpu"}])
def test_extrapolated_layers_equal_the_whole_model(options: dict[str, Any]):
    storage, step = QosoraConfig(rank=8, scale="columns"), StepOptions(**options)
    few, whole = (TracedModel(LLAMA, storage, step, full_depth=full) for full in (False, True))
    got, expected = (model.predict(Batch(2, 64)) for model in (few, whole))
    for phase in ("forward", "loss", "backward"):
        assert got.phases[phase] == expected.phases[phase], phase
    assert (got.peak_bytes, got.live) == (expected.peak_bytes, expected.live)


def test_the_vectors_are_counted():
    step = StepOptions(device="cpu")
    plain, scaled = (
        TracedModel(LLAMA, QosoraConfig(rank=8, scale=scale), step).predict(Batch(1, 16)) for scale in (None, "columns")
    )
    inputs = 6 * LLAMA.hidden_size + LLAMA.intermediate_size  # of a layer's seven projections
    assert scaled.live["factors"] - plain.live["factors"] == 4 * inputs * LLAMA.num_hidden_layers
