"""Extrapolated layers equal the full-depth trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from qosora.config import QosoraConfig
from qosora.errors import QosoraError
from qosora.memory.meta_kernels import MetaKernels
from qosora.memory.options import Batch, StepOptions
from qosora.memory.predict import TracedModel, _depths

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
    # experts in one tensor, a full layer after three chunked ones, and a list of the numbers of the layers with experts
    "llama4": Llama4TextConfig(num_hidden_layers=16, num_local_experts=2, intermediate_size_mlp=96, **SIZES),
    "gpt_oss": GptOssConfig(num_hidden_layers=10, num_local_experts=4, num_experts_per_tok=2, **SIZES),
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
        ("llama4", {}),
        ("gpt_oss", {}),
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


AWAY: list[dict[str, Any]] = [
    {"base_on": "host"}, {"strategy": "fsdp", "gpus": 2}, {"base_on": "host", "strategy": "fsdp", "gpus": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", AWAY)
def test_a_base_that_comes_layer_by_layer(options: dict[str, Any]):
    resident, away = (TracedModel(CONFIGS["llama"], STORAGE, StepOptions(**o)) for o in ({}, options))
    before, after = (model.predict(Batch(2, 64)) for model in (resident, away))
    host = "base_on" in options
    part = 0 if host else 1 / options["gpus"]
    for name in ("base residual", "factors"):
        kept = after.live.get(name, 0)
        assert before.live[name] - kept == away.layer_bytes[name] - round(part * away.layer_bytes[name])
    layers = CONFIGS["llama"].num_hidden_layers
    assert after.live["layers in use"] == (3 if host else 4) * sum(away.layer_bytes.values()) // layers
    same = set(before.live) - {"base residual", "factors", "embeddings and head"}
    assert {name: after.live[name] for name in same} == {name: before.live[name] for name in same}
    assert after.live["embeddings and head"] - before.live["embeddings and head"] == round(part * away.ends_bytes)
    assert after.site == before.site
    assert sum(after.live.values()) == after.peak_bytes
    frozen = sum(p.nbytes for p in whole_base("llama") if not p.requires_grad)
    assert sum(away.layer_bytes.values()) + away.ends_bytes == frozen
    assert away.host_bytes == (frozen // options.get("gpus", 1) if host else 0)
    assert resident.host_bytes == 0


def whole_base(name: str) -> list[torch.Tensor]:
    """Return the parameters of all of a model."""
    return list(TracedModel(CONFIGS[name], STORAGE, StepOptions(), full_depth=True).model.parameters())


def test_flash_backward_has_its_float32_accumulator():
    traced = TracedModel(CONFIGS["llama"], STORAGE, StepOptions())
    sites = traced._trace(Batch(1, 512), traced.depths[-1], MetaKernels(answer=True))
    works = [p.live["workspace"] for p in sites.values() if "workspace" in p.live]
    # dQ (heads, tokens, head_dim to 32) in float32 with row sums; dK and dV of all heads in 16 bits
    assert 4 * 512 * (32 + 1) * 4 + 2 * 4 * 512 * 16 * 2 in works


def test_a_model_that_reads_values_is_refused(monkeypatch: pytest.MonkeyPatch):
    traced = TracedModel(CONFIGS["llama"], STORAGE, StepOptions(tile_length=0))
    monkeypatch.setattr(type(traced.layers[0].mlp), "forward", lambda self, x: x[: int(x.nonzero().shape[0])])
    with pytest.raises(QosoraError, match="LlamaForCausalLM cannot be traced without weights"):
        traced.predict(Batch(1, 16))
