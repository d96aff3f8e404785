"""Extrapolated layers equal the full-depth trace."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from qosora.config import QosoraConfig
from qosora.errors import QosoraError
from qosora.memory.predict import StepOptions, TracedModel, _depths
from qosora.memory.step import Batch

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "head_dim": 16,
}  # fmt: skip


CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(num_hidden_layers=10, **SIZES),
    "qwen3": Qwen3Config(num_hidden_layers=6, tie_word_embeddings=True, **SIZES),
    # two sliding layers, then a full one, and a rest of two: 3 layers a period
    "gemma3": Gemma3TextConfig(
        num_hidden_layers=11, sliding_window=32, **SIZES,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 3 + ["sliding_attention"] * 2,
    ),
    "mixtral": MixtralConfig(num_hidden_layers=5, num_local_experts=4, **SIZES),
}  # fmt: skip


STORAGE = QosoraConfig(rank=8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"tile_length": 24}),
        ("gemma3", {"tile_length": 24, "device": "cpu"}),
        ("llama", {"gradient_checkpointing": False, "chunked_loss": False}),
        ("llama", {"method": "qlora", "gradient_checkpointing": False}),
        ("qwen3", {"device": "cpu", "gradient_checkpointing": False, "precision": "fp32"}),
        ("qwen3", {"method": "qlora", "device": "cpu", "attn_implementation": "eager"}),
        ("gemma3", {"gradient_checkpointing": False, "vectors": "s"}),
        ("mixtral", {}),
        ("mixtral", {"gradient_checkpointing": False, "device": "cpu"}),
    ],
)
@pytest.mark.slow
def test_extrapolated_layers_equal_the_whole_model(name: str, options: dict[str, Any]):
    step = StepOptions(**options)
    few, whole = (TracedModel(CONFIGS[name], STORAGE, step, full_depth=full) for full in (False, True))
    assert few.depths[-1] < CONFIGS[name].num_hidden_layers == whole.depths[0] == few.count
    batch = Batch(2, 64, padding=name == "llama")
    got, expected = few.predict(batch), whole.predict(batch)
    # the stacked norms of the vectors' gradients, a few bytes each, are rounded to 512 as one
    for phase in ("forward", "loss", "backward"):
        assert got.phases[phase] == expected.phases[phase], phase
    assert abs(got.phases["optimizer"] - expected.phases["optimizer"]) <= 512 * few.count
    assert (got.peak_bytes, got.live, got.site, got.op) == (
        expected.peak_bytes, expected.live, expected.site, expected.op,
    )  # fmt: skip
    assert sum(got.live.values()) == got.peak_bytes
    assert (few.trained_parameters, few.paged_bytes) == (whole.trained_parameters, whole.paged_bytes)


def test_extrapolated_layers_with_offloading():
    options = StepOptions(activation_offloading=True, optimizer="paged_lion_8bit")
    few, whole = (TracedModel(CONFIGS["llama"], STORAGE, options, full_depth=full) for full in (False, True))
    assert few.depths[-1] < whole.count
    got, expected = (model.predict(Batch(2, 64)) for model in (few, whole))
    assert got.phases == pytest.approx(expected.phases, rel=1e-3)  # which small tensors are on their way may differ


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaaaaaa", (2, 3)),
        ("aab" * 4, (6, 9)),
        ("aab" * 5 + "aa", (5, 8)),
        ("aaaab", (5,)),  # no period
        ("aa", (2,)),
        ("abababab", (4, 6)),
    ],
)
def test_depths(kinds: str, expected: tuple[int, ...]):
    assert _depths(list(kinds), least=2) == expected
    assert _depths(list(kinds), least=len(kinds)) == (len(kinds),)


def test_flash_backward_has_its_float32_accumulator():
    options = StepOptions()
    found = TracedModel(CONFIGS["llama"], STORAGE, options).predict(Batch(1, 512))
    works = [p.live["workspace"] for p in found.sites.values() if "workspace" in p.live]
    # dQ (heads, tokens, head_dim to 32) in float32 with row sums; dK and dV of all heads in 16 bits
    assert 4 * 512 * (32 + 1) * 4 + 2 * 4 * 512 * 16 * 2 in works


def test_a_model_that_reads_values_is_refused(monkeypatch: pytest.MonkeyPatch):
    traced = TracedModel(CONFIGS["llama"], STORAGE, StepOptions(tile_length=0))
    monkeypatch.setattr(type(traced.layers[0].mlp), "forward", lambda self, x: x[: int(x.nonzero().shape[0])])
    with pytest.raises(QosoraError, match="LlamaForCausalLM cannot be traced without weights"):
        traced.predict(Batch(1, 16))
