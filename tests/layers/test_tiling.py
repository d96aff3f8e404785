"""MLPs and norms in tiles: the same outputs and gradients, in less memory, and nothing else is touched."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from linear_checks import build, draw, grad, vectors
from peft import PeftModel, get_peft_model
from tiny import decompose, logits, make_checkpoint, make_model, relative_difference, rounding, token_ids
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qosora.config import OsoraConfig
from qosora.errors import ConfigError
from qosora.layers import ops
from qosora.layers.tiling import TILE_LENGTH, Tiling, apply_tiling

Adapted = Callable[..., PeftModel]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A base of a family with an adapter that is not at its start, in training mode; dropout off."""
    folder = tmp_path_factory.mktemp("tiling")

    def make(family: str = "llama", *, dtype: torch.dtype = torch.float32, **adapter: Any) -> PeftModel:
        if not (folder / family).exists():
            make_checkpoint(folder / family, family)
        model = get_peft_model(decompose(folder / family, dtype=dtype), OsoraConfig(**adapter))
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p *= 1 + 0.1 * torch.randn(p.shape, generator=generator)
        return model.train()

    return make


def use_checkpointing(model: PeftModel) -> None:
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def step(model: nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step on random tokens, of an odd number, or on what is given."""
    inputs = inputs or {"input_ids": token_ids(2, 23)}
    labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(())) == 0, -100)
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare by norm, tensor by tensor, relative to the norm of all gradients of the decoder layer.

    A tensor's own norm is no measure of its roundings: its gradient may be the small rest of large terms. So that of
    the keys: attention's softmax takes no notice of what is added to all scores of a query. Relative to its own norm
    a gradient may be out by 50 times the tolerance, which no mistake is small enough for.
    """
    assert got.keys() == expected.keys()
    norms = {name: tensor.double().norm() for name, tensor in expected.items()}
    for name, tensor in expected.items():
        error = (got[name].double() - tensor.double()).norm()
        beside = torch.stack([norm for other, norm in norms.items() if layer_of(other) == layer_of(name)]).norm()
        assert error < tolerance * beside, f"{name}: {error / beside:.2e} of its layer's gradients"
        assert error < min(50 * tolerance, 0.5) * norms[name], f"{name}: {error / norms[name]:.2e} of its own norm"


def layer_of(name: str) -> str:
    """Return the name of the decoder layer that a parameter is in; its own name, if it is in none."""
    found = re.match(r".*\.(?:layers|h)\.\d+\.", name)
    return found[0] if found else name


def names(family: str) -> set[str]:
    """Module names that are tiled, without the layers' numbers."""
    with torch.device("meta"):
        model = make_model(family)
    return {name.split(".", 3)[-1] for name in apply_tiling(model)}


_LLAMA = {"mlp", "input_layernorm", "post_attention_layernorm", "norm"}
_EXPERTS = {"input_layernorm", "post_attention_layernorm", "norm"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", _LLAMA),
        ("mistral", _LLAMA),
        ("phi3", _LLAMA),
        ("qwen3", _LLAMA | {"self_attn.q_norm", "self_attn.k_norm"}),
        ("gemma3", _LLAMA | {"self_attn.q_norm", "self_attn.k_norm"}
         | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}),
        ("gpt2", {"mlp"}),
        # the experts' blocks give routing statistics, too
        ("mixtral", _EXPERTS),
        ("olmoe", _EXPERTS | {"self_attn.q_norm", "self_attn.k_norm"}),
        ("qwen2_moe", _EXPERTS | {"mlp.shared_expert"}),
        ("qwen3_moe", _LLAMA | {"self_attn.q_norm", "self_attn.k_norm"}),
    ],
)  # fmt: skip
def test_what_is_tiled(family: str, expected: set[str]):
    assert names(family) == expected


# ---- outputs and gradients

#: Sums in another order, in three passes: forward, forward again, and the gradients' own products. 2.4e-5.
FP32 = rounding(torch.float32) * 3**0.5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "llama-tied-bias", "mistral", "phi3", "qwen3", "gemma3", "gpt2", "qwen2_moe"]
)
def test_gradients_are_those_of_the_whole_sequence(adapted: Adapted, family: str, checkpointing: bool):
    model = adapted(family)
    if checkpointing:
        use_checkpointing(model)
    expected = step(model)
    assert apply_tiling(model, 5)
    got = step(model)
    assert len(got) > 8
    assert_close(got, expected, FP32)


@pytest.mark.parametrize("tile_length", [1, 7, 22, 45, 46, 1000])
def test_any_tile_length(adapted: Adapted, tile_length: int):
    model = adapted()
    expected = step(model)
    apply_tiling(model, tile_length)
    assert_close(step(model), expected, FP32)


def test_padding_and_packing(adapted: Adapted):
    model = adapted()
    ids = token_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    positions = torch.cat([torch.arange(9), torch.arange(37)])[None]
    padded, packed = (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids.view(1, -1), "position_ids": positions},
    )
    expected = [step(model, **padded), step(model, **packed)]
    apply_tiling(model, 6)
    for inputs, before in zip((padded, packed), expected, strict=True):
        assert_close(step(model, **inputs), before, FP32)


def test_bfloat16(adapted: Adapted):
    """Outputs are rounded to 8 bits in either order; what differs is which way the roundings fall."""
    exact = step(adapted())
    model = adapted(dtype=torch.bfloat16)
    whole = step(model)
    apply_tiling(model, 5)
    got = step(model)
    assert_close(got, exact, 0.1)
    assert_close(whole, exact, 0.1)
    assert_close(got, whole, 0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_is_that_of_the_forward_pass(adapted: Adapted, checkpointing: bool):
    model = adapted(modules_to_save=["lm_head"])
    if checkpointing:
        use_checkpointing(model)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=token_ids(2, 23), labels=token_ids(2, 23)).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected = run()
    apply_tiling(model, 5)
    assert_close(run(), expected, 0.02)


def test_trained_norms_and_matrices(adapted: Adapted):
    """modules_to_save: whole parameters inside tiles, of norms and an MLP's projections that are not decomposed."""
    model = adapted(modules_to_save=["post_attention_layernorm", "norm"])
    expected = step(model)
    assert any("layernorm" in name for name in expected)
    apply_tiling(model, 5)
    assert_close(step(model), expected, FP32)


@pytest.mark.parametrize("vectors", ["s", "o"])
def test_one_vector_alone(adapted: Adapted, vectors: str):
    model = adapted(vectors=vectors)
    expected = step(model)
    apply_tiling(model, 5)
    assert_close(step(model), expected, FP32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_in_backward(checkpointing: bool):
    """The gradient is that of the output: the scalar product of both is the change along the gradient's direction."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.drop, self.down = nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.drop(self.act(self.up(x))))

    mlp = MLP().double().train()
    model = nn.ModuleDict({"mlp": mlp})
    model.config = _Config(8)  # type: ignore[assignment]
    assert apply_tiling(model, 3) == ["mlp"]
    x = torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        y: torch.Tensor = checkpoint(mlp, x, use_reentrant=False) if checkpointing else mlp(x)
        return y.square().sum()

    assert torch.autograd.gradcheck(run, x)


class _Config:
    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size

    def get_text_config(self) -> _Config:
        return self


def test_evaluation(adapted: Adapted):
    model = adapted()
    expected = logits(model)
    apply_tiling(model, 3)
    assert relative_difference(logits(model), expected) < rounding(torch.float32)


# ---- memory and work


def saved_bytes(model: nn.Module) -> int:
    """Return what a forward pass keeps for backward, without parameters."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=token_ids(2, 23), use_cache=False).logits.sum()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for start, storage in kept.items() if start not in parameters)


def test_less_is_saved(adapted: Adapted):
    model = adapted(dtype=torch.bfloat16)
    found = []
    for options in ({"tile_length": 0}, {"mlps": False}, {"tile_length": 5}):
        apply_tiling(model, **options)
        found.append(saved_bytes(model))
    whole, norms, tiled = found
    tokens, layers, n, m = 46, 2, 32, 56
    # norms, but for the first, which gives no gradient on, saved float32 copies of their bfloat16 inputs
    assert whole - norms >= 2 * layers * tokens * n * 2
    # gate, up, activation, and their h, against the norm's output
    assert norms - tiled >= layers * tokens * (3 * m - n) * 2


class _LiveBytes(TorchDispatchMode):
    """The most bytes of new tensors that are live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known[key] = weakref.ref(storage, partial(self.freed, key, storage.nbytes()))
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def freed(self, key: int, nbytes: int, _: Any) -> None:
        del self.known[key]
        self.live -= nbytes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_falls(adapted: Adapted, family: str, checkpointing: bool):
    model = adapted(family)
    if checkpointing:
        use_checkpointing(model)
    peaks = []
    for tile_length in (0, 20):
        apply_tiling(model, tile_length)
        with _LiveBytes() as live:
            out = model.get_base_model().model(input_ids=token_ids(2, 100), use_cache=False).last_hidden_state
            out.sum().backward()
        del out
        peaks.append(live.peak)
    intermediate = 200 * 56 * 4
    assert peaks[0] - peaks[1] > 3 * intermediate  # of six, of which a tenth remains; the input is held beside them


class _Counting(nn.Module):
    """An MLP that counts its rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        self.rows = 0
        self.largest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += x.shape[0] * x.shape[1]
        self.largest = max(self.largest, x.shape[0] * x.shape[1])
        y: torch.Tensor = self.down(self.act(self.up(x)))
        return y


@pytest.mark.parametrize("after", ["add", "norm", "norm and add", "norm of a changed output"])
@pytest.mark.parametrize(("tiled", "checkpointing"), [(True, True), (True, False), (False, True)])
def test_no_row_is_computed_a_third_time(tiled: bool, checkpointing: bool, after: str):
    mlp, norm = _Counting(8), LlamaRMSNorm(8).requires_grad_(False)
    model = nn.ModuleDict({"mlp": mlp, "norm": norm})
    model.config = _Config(8)  # type: ignore[assignment]
    inputs = torch.randn(2, 12, 8)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = mlp(x.tanh())
        if after == "norm of a changed output":
            return x + norm(y.mul_(2))
        return {"add": lambda: x + y, "norm": lambda: x + norm(y), "norm and add": lambda: y * norm(y)}[after]()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        x = inputs.clone().requires_grad_()
        out = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
        out.square().sum().backward()
        return {"x": grad(x), **{name: grad(p) for name, p in mlp.named_parameters()}}

    expected = gradients()
    if tiled:
        apply_tiling(model, 6)
    mlp.rows = mlp.largest = 0
    assert_close(gradients(), expected, FP32)
    third = checkpointing and tiled and after in ("norm and add", "norm of a changed output")  # the output is needed
    assert mlp.rows == (3 if third else 2) * 24
    assert mlp.largest == (6 if tiled else 24)


def test_one_tile_runs_untouched(adapted: Adapted):
    mlp = _Counting(8)
    model = nn.ModuleDict({"mlp": mlp})
    model.config = _Config(8)  # type: ignore[assignment]
    apply_tiling(model, 24)
    mlp(torch.randn(2, 12, 8, requires_grad=True)).sum().backward()
    assert mlp.rows == 24


# ---- beside other things


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded(adapted: Adapted, checkpointing: bool):
    """Hooks on saved tensors see what is saved for backward, not what a tile needs for a moment."""
    model = adapted()
    apply_tiling(model, 5)
    expected = step(model)
    if checkpointing:
        use_checkpointing(model)
    seen: list[bool] = []
    backward = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(backward)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        model.zero_grad()
        loss = model(input_ids=token_ids(2, 23), labels=token_ids(2, 23)).loss
        backward = True
        loss.backward()
    got = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    assert_close(got, expected, FP32)
    assert seen
    assert not any(seen)


def test_on_meta(adapted: Adapted):
    with torch.device("meta"):
        model = make_model("llama")
    apply_tiling(model, 5)
    model(input_ids=torch.zeros(2, 23, dtype=torch.int64, device="meta")).logits.sum().backward()
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").grad.shape == (56, 32)


def test_undone_and_done_again(adapted: Adapted):
    model = adapted()
    before = {name: module.forward for name, module in model.named_modules()}
    first = apply_tiling(model, 5)
    assert apply_tiling(model, 7) == first
    expected = step(model)
    assert_close(step(copy.deepcopy(model)), expected, 1e-9)
    assert apply_tiling(model, 0) == []
    assert {name: module.forward for name, module in model.named_modules()} == before


def test_a_forward_of_someone_else_stays(adapted: Adapted):
    """As Liger puts its own into norms and MLPs."""
    model = adapted()
    layer = model.get_base_model().model.layers[0]
    own_norm, own_mlp = layer.input_layernorm.forward, layer.mlp.forward
    layer.input_layernorm.forward = norm = lambda x: own_norm(x)
    layer.mlp.forward = mlp = lambda x: own_mlp(x)
    found = apply_tiling(model, 5)
    assert not any(name.endswith("layers.0.input_layernorm") for name in found)
    assert any(name.endswith("layers.0.mlp") for name in found)
    apply_tiling(model, 0)
    assert layer.input_layernorm.forward is norm
    assert layer.mlp.forward is mlp


def test_a_negative_length_is_refused(adapted: Adapted):
    with pytest.raises(ConfigError, match="tile_length must be at least 0, got -1"):
        apply_tiling(adapted(), -1)


@pytest.mark.parametrize(
    ("tile_length", "gradient_checkpointing", "expected"),
    [
        (None, True, Tiling(TILE_LENGTH, mlps=True)),
        (None, False, Tiling(TILE_LENGTH, mlps=False)),
        (8, True, Tiling(8, mlps=True)),
        (8, False, Tiling(8, mlps=True)),
        (0, False, Tiling(0, mlps=True)),
    ],
)
def test_what_a_tile_length_means(tile_length: int | None, gradient_checkpointing: bool, expected: Tiling):
    assert Tiling.of(tile_length, gradient_checkpointing=gradient_checkpointing) == expected


# ---- the last product of a checkpointed layer


@pytest.mark.parametrize("trained", ["both", "s", "o"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_first_changes_no_bit(trained: str, dtype: torch.dtype):
    layer = build(70, 96, 24, seed=0)
    results = []
    for saves_first in (False, True):
        layer.saves_first = saves_first
        x = draw(5, 70, seed=1, dtype=dtype).requires_grad_()
        s, o = vectors(layer)
        s.requires_grad_(trained != "o")
        o.requires_grad_(trained != "s")
        y = layer.apply_vectors(x, s, o)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, s.grad, o.grad])
    for before, after in zip(*results, strict=True):
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before, after)


def test_a_checkpointed_layer_computes_its_last_product_once(adapted: Adapted, monkeypatch: pytest.MonkeyPatch):
    """In forward; when the layer is computed again, that ends with what its last product saves."""
    decoded: list[tuple[int, ...]] = []
    dequantize = ops.dequantize

    def counted(q: Any, *args: Any) -> torch.Tensor:
        decoded.append(q.shape)
        return dequantize(q, *args)

    monkeypatch.setattr(ops, "dequantize", counted)
    counts = []
    for mlps in (False, True):
        model = adapted("llama")
        use_checkpointing(model)
        apply_tiling(model, mlps=mlps)
        down = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").base_layer
        assert down.saves_first == mlps
        decoded.clear()
        step(model)
        counts.append(decoded.count((down.out_features, down.in_features)))
    layers = 2
    assert counts == [3 * layers, 2 * layers]  # forward, again, backward
