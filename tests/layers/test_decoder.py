"""torch.compile: one graph, the same numbers, and no more kept for backward than without it.

The graphs run as PyTorch operators ("aot_eager"): partitioning is that of the default backend, and nothing is built.
"""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_checks import DTYPES, build, draw, grad, vectors
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training_runs import config, metrics
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
)

from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import ConfigError, QosoraError
from qosora.layers.decoder import decoder_layers, name_backbone, require_checkpointing
from qosora.layers.tiling import Tiling
from qosora.memory.options import StepOptions
from qosora.memory.profile import random_model
from qosora.memory.step import prepare_model
from qosora.training.run import train

# Dynamo hides the warning, but not where warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def saved_bytes(function: Any, x: Tensor) -> int:
    """Bytes of floating-point matrices that a call keeps for backward."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(t.nbytes for t in saved if t.is_floating_point() and t.ndim == 2)


@pytest.mark.parametrize(
    ("dtype", "autocast", "options"),
    [
        *((dtype, False, {}) for dtype in DTYPES),
        (torch.float32, True, {}),
        (torch.bfloat16, False, {"double_quant": False}),
        (torch.float32, False, {"quant_type": "fp4", "blocksize": 32}),
    ],
)
def test_the_layer_is_one_graph_that_keeps_h_alone(dtype: torch.dtype, autocast: bool, options: dict[str, Any]):
    rows, n, m, rank = 40, 128, 96, 8
    layer = build(n, m, rank, **options)
    x, g = draw(rows, n, seed=0, dtype=dtype).requires_grad_(), draw(rows, m, seed=1, dtype=dtype)
    s, o = vectors(layer)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer.apply_vectors(x, s, o)

    graph = compiled(run)
    expected, got = run(x), graph(x)
    assert torch.equal(got, expected)
    g = g.to(got.dtype)
    for want, found in zip(*(torch.autograd.grad(y, (x, s, o), g) for y in (expected, got)), strict=True):
        assert torch.equal(found, want)
    assert saved_bytes(graph, x) == saved_bytes(run, x) == rows * rank * got.element_size()
    with torch.no_grad():
        assert torch.equal(graph(x), run(x))


@pytest.mark.parametrize("wanted", ["x", "s", "o", "xs"])
def test_only_the_gradients_that_are_asked_for(wanted: str):
    layer = build(64, 48, 8)
    leaves = dict(zip("xso", (torch.randn(5, 64), layer.s.clone(), layer.o.clone()), strict=True))
    for name in wanted:
        leaves[name].requires_grad_()
    compiled(layer.apply_vectors)(*leaves.values()).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
    expected = torch.autograd.grad(layer.apply_vectors(*leaves.values()).sum(), [leaves[name] for name in wanted])
    assert all(torch.equal(grad(leaves[name]), g) for name, g in zip(wanted, expected, strict=True))


def test_any_number_of_rows():
    layer = build(64, 48, 8)
    graph = compiled(lambda x, s, o: layer.apply_vectors(x, s, o).sum(), dynamic=True)
    s, o = vectors(layer)
    for shape in ((2, 7), (3, 5), (1, 11)):
        x = torch.randn(*shape, 64, requires_grad=True)
        assert torch.equal(*(torch.autograd.grad(f(x, s, o), s)[0] for f in (
            graph, lambda *args: layer.apply_vectors(*args).sum())))  # fmt: skip


@pytest.mark.parametrize(("checkpointing", "precision"), [(True, "bf16"), (False, "fp32")])
@pytest.mark.slow
def test_a_decoder_layer_is_one_graph_for_all(checkpointing: bool, precision: str):
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    step = StepOptions(gradient_checkpointing=checkpointing, precision=precision, device="cpu")
    model: Any = get_peft_model(random_model(shape, QosoraConfig(rank=8), step), OsoraConfig())
    prepare_model(model, gradient_checkpointing=checkpointing, tiling=Tiling.of(0))
    ids = torch.randint(0, 64, (2, 16))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients()
    for layer in decoder_layers(model.get_base_model())[1]:
        layer.compile(fullgraph=True, backend="aot_eager")
    for want, found in zip(expected, gradients(), strict=True):
        assert (found - want).norm() <= (1e-5 if precision == "fp32" else 0.05) * want.norm()
    assert not counters["graph_break"]
    # The first layer's input needs no gradient where nothing is checkpointed
    assert counters["stats"]["unique_graphs"] == (1 if checkpointing else 2)


@pytest.mark.slow
def test_training_compiled(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    losses = []
    for compile in (False, True):
        train(config(place, tmp_path / str(compile), compile=compile, max_steps=2))
        losses.append([line["loss"] for line in metrics(tmp_path / str(compile))])
    assert counters["stats"]["unique_graphs"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_backbone_that_the_class_misnames():
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96,
        "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 24, "pad_token_id": 0,
    }  # fmt: skip
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes))
        other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4))
    assert model.base_model is model
    for each in (model, other):
        name_backbone(each)
        assert each.base_model is next(each.children())
    model.base_model_prefix = "no such"
    del model.model
    with pytest.raises(QosoraError, match="Llama4ForCausalLM has no module with all that is below its output layer"):
        name_backbone(model)


def test_what_cannot_recompute_is_told_so():
    with torch.device("meta"):
        model = CTRLLMHeadModel(CTRLConfig(n_embd=32, n_layer=1, n_head=4, dff=32, vocab_size=96))
    with pytest.raises(
        ConfigError, match="CTRLLMHeadModel cannot recompute its activations: turn gradient_checkpointing"
    ):
        require_checkpointing(model)
