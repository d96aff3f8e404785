"""Stand-ins hold what the real parts do."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_checkpoint
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

from qosora.config import QosoraConfig
from qosora.layers.tiling import Tiling
from qosora.memory.options import Batch, StepOptions
from qosora.memory.predict import TracedModel
from qosora.memory.profile import measure
from qosora.memory.standins import OffloadingStandIn, PackedStandIn, state_shapes
from qosora.memory.step import prepare_model
from qosora.memory.tracer import Tracer
from qosora.training.flat_buffers import OPTIMIZERS
from qosora.training.optimizer import PackedPagedOptimizer


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
