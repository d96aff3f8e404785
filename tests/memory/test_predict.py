"""Extrapolated layers equal the full-depth trace; stand-ins hold what the real parts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_bases import make_checkpoint
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from qosora.config import QosoraConfig
from qosora.errors import QosoraError
from qosora.layers.tiling import Tiling
from qosora.memory.meta_kernels import MetaKernels, computing_as
from qosora.memory.predict import StepOptions, TracedModel, _depths
from qosora.memory.profile import measure
from qosora.memory.standins import OffloadingStandIn, PackedStandIn, state_shapes
from qosora.memory.step import Batch, prepare_model
from qosora.memory.tracer import Tracer
from qosora.training.flat_buffers import OPTIMIZERS
from qosora.training.optimizer import PackedPagedOptimizer

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
def test_extrapolated_layers_equal_the_whole_model(name: str, options: dict[str, Any]):
    options = StepOptions(**options)
    few, whole = (TracedModel(CONFIGS[name], STORAGE, options, full_depth=full) for full in (False, True))
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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [3, 40])
def test_packed_stand_in_holds_what_the_optimizer_does(name: str, count: int):
    lengths = [100 + 7 * i for i in range(count)]
    real = [nn.Parameter(torch.zeros(n)) for n in lengths]
    optimizer = PackedPagedOptimizer(real, lr=1e-3, optimizer=name)
    for p in real:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    memory = optimizer.memory()
    tracer, meta = Tracer(), [nn.Parameter(torch.zeros(n, device="meta")) for n in lengths]
    with tracer:
        stand_in = PackedStandIn(meta, tracer, name, False, memory.parameter_bytes // 4)
        for p in meta:
            p.grad = torch.zeros_like(p)
        stand_in.step()
        live = tracer.live()
    assert live["adapter"] == memory.parameter_bytes
    assert live["gradients"] == memory.gradient_bytes
    assert live["optimizer state"] == memory.state_bytes


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("numel", [4095, 4096, 100_000])
def test_state_shapes_are_those_of_bitsandbytes(name: str, numel: int):
    kind = OPTIMIZERS[name]
    p = nn.Parameter(torch.zeros(numel))
    p.grad = torch.zeros_like(p)
    optimizer = kind.cls([p], optim_bits=kind.bits, is_paged=False)
    optimizer.step()
    state = optimizer.state[p]
    tensors = [v for k, v in state.items() if isinstance(v, torch.Tensor) and not k.startswith("qmap")]
    expected = sum(size[0] * dtype.itemsize for size, dtype in state_shapes(numel, name))
    assert sum(t.nbytes for t in tensors) == expected


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_qlora_stand_in_equals_bitsandbytes(tmp_path: Path, checkpointing: bool):
    folder = make_checkpoint(tmp_path / "llama")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(torch.bfloat16)
    prepare_model(model, gradient_checkpointing=checkpointing, tiling=Tiling.of(gradient_checkpointing=checkpointing))
    optimizer = bitsandbytes.optim.AdamW(trained, optim_bits=32)
    options = StepOptions(method="qlora", lora_rank=4, gradient_checkpointing=checkpointing, device="cpu")
    batch = Batch(2, 64, padding=True)
    live = measure(model, batch.tensors(96, "cpu"), optimizer, options, steps=1)["live"]
    planned = TracedModel(model.config, QosoraConfig(), options).predict(batch)
    for phase, measured in live.phases.items():
        assert planned.phases[phase] == pytest.approx(measured, rel=0.01), phase
    assert planned.live["base residual"] == pytest.approx(live.rows["base residual"], rel=0.01)


def test_meta_kernels_give_what_operations_give():
    kernels = MetaKernels(answer=True)
    a = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    for _ in range(2):  # computed, then remembered
        tracer = Tracer(run=kernels)
        with tracer:
            product, parts = a @ a.T, torch.topk(a.float(), 2)
            view, same = a.T, a.add_(1)
            assert bool((a > 0).all()) is True
            picked = a[torch.ones(3, dtype=torch.bool, device="meta")]
        assert product.shape == (3, 3)
        assert product.dtype == torch.bfloat16
        assert [p.dtype for p in parts] == [torch.float32, torch.int64]
        assert same is a
        assert view.untyped_storage()._cdata == a.untyped_storage()._cdata
        assert picked.shape == (3, 4)


def test_flash_attention_of_the_device_is_taken():
    q = torch.empty(1, 4, 256, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    peaks = {}
    for device in ("cuda", "cpu", "math"):
        tracer = Tracer()
        with computing_as(device) if device != "math" else torch.no_grad(), tracer:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        peaks[device] = tracer.peak()[1].total
    scores = 4 * 256 * 256 * 2
    assert peaks["math"] > scores > peaks["cuda"]
    assert scores > peaks["cpu"]


def test_flash_backward_has_its_float32_accumulator():
    options = StepOptions()
    found = TracedModel(CONFIGS["llama"], STORAGE, options).predict(Batch(1, 512))
    works = [p.live["workspace"] for p in found.sites.values() if "workspace" in p.live]
    # dQ (heads, tokens, head_dim to 32) in float32 with row sums; dK and dV of all heads in 16 bits
    assert 4 * 512 * (32 + 1) * 4 + 2 * 4 * 512 * 16 * 2 in works


def test_offloading_keeps_few_saved_tensors():
    x = torch.empty(1000, 100, device="meta", requires_grad=True)
    peaks = []
    for saving in (None, OffloadingStandIn):
        tracer = Tracer()
        with tracer:
            tracer.register([x], "batch")
            with saving([x]) if saving else torch.enable_grad():
                y = x
                for _ in range(20):
                    y = y.exp()
                peaks.append(tracer.total)
                y.sum().backward()
        x.grad = None
    kept, offloaded = (p // x.nbytes for p in peaks)
    assert kept == 21
    assert offloaded == 1 + 5  # the input, and the last five results


def test_a_model_that_reads_values_is_refused(monkeypatch: pytest.MonkeyPatch):
    traced = TracedModel(CONFIGS["llama"], STORAGE, StepOptions(tile_length=0))
    monkeypatch.setattr(type(traced.layers[0].mlp), "forward", lambda self, x: x[: int(x.nonzero().shape[0])])
    with pytest.raises(QosoraError, match="LlamaForCausalLM cannot be traced without weights"):
        traced.predict(Batch(1, 16))
