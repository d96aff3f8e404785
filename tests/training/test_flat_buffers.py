"""Flat buffers: what parameters and gradients are windows of, for the optimizer and for whoever saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from vectors_to_train import SIZES, Vectors, assert_equal, train

from qosora.errors import ConfigError, QosoraError
from qosora.training.flat_buffers import PAGED_NUMEL
from qosora.training.optimizer import PackedPagedOptimizer, create_optimizer


def grads_are_views(optimizer: PackedPagedOptimizer) -> bool:
    return all(
        p.grad is not None and p.grad.untyped_storage().data_ptr() == buffer.grad.untyped_storage().data_ptr()
        for buffer in optimizer.buffers
        for p in buffer.params
        if buffer.grad is not None
    )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_the_flat_gradient(set_to_none: bool) -> None:
    model = Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    flat = optimizer.buffers[0].grad
    assert flat is not None
    address = flat.data_ptr()
    assert grads_are_views(optimizer)
    for _ in range(2):
        model().backward()
        assert grads_are_views(optimizer)
        assert all(v.grad.abs().max() > 0 for v in model.vectors)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert grads_are_views(optimizer)
        assert all(v.grad.eq(0).all() for v in model.vectors)
        assert optimizer.buffers[0].grad is flat
        assert flat.data_ptr() == address


@pytest.mark.parametrize("zero", ["optimizer", "model", "fresh"])
def test_gradients_from_elsewhere_are_gathered(zero: str) -> None:
    # Trainer calls model.zero_grad(), which unbinds the views; autograd then makes fresh gradients.
    reference, model = Vectors(), Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    expected = train(reference, create_optimizer(reference, lr=1e-2), range(5))
    for step in range(5):
        optimizer.zero_grad() if zero == "optimizer" else model.zero_grad()
        model(step).backward()
        if zero == "fresh":
            for v in model.vectors:
                v.grad = v.grad.clone()
        optimizer.step()
        assert grads_are_views(optimizer)
    assert_equal(model.values(), expected)


def test_a_missing_gradient_counts_as_zero_and_none_at_all_skips() -> None:
    model, reference = Vectors((300, 300)), Vectors((300, 300))
    optimizer, plain = create_optimizer(model, lr=1e-2), torch.optim.AdamW(reference.vectors, lr=1e-2, weight_decay=0)
    for m in (model, reference):
        m(0).backward()
    optimizer.step()
    plain.step()
    model.zero_grad()
    reference.zero_grad()
    before = model.values()
    optimizer.step()
    assert_equal(model.values(), before)
    assert optimizer.state_dict()["state"][0]["step"] == 1
    model.vectors[0].grad = torch.ones(300)
    reference.vectors[0].grad = torch.ones(300)
    reference.vectors[1].grad = torch.zeros(300)
    optimizer.step()
    plain.step()
    for a, b in zip(model.vectors, reference.vectors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_memory_counts_what_is_held() -> None:
    model = Vectors((100, 300))
    optimizer = create_optimizer(model, lr=1e-2)
    assert optimizer.memory() == (4 * 768, 4 * 768, 0, 0)
    train(model, optimizer, range(1))
    assert optimizer.memory() == (4 * 768, 4 * 768, 8 * 768, 0)
    model = Vectors((5120,))
    optimizer = create_optimizer(model, lr=1e-2, optimizer="paged_adamw_8bit")
    train(model, optimizer, range(1))
    maps = 2 * 256 * 4
    assert optimizer.memory() == (4 * 5120, 4 * 5120, 2 * (5120 + 4 * 20) + maps, 0)


def test_parameters_stay_the_same_objects_with_the_same_values() -> None:
    model = Vectors()
    before, held = model.values(), list(model.vectors)
    views = [v.detach() for v in model.vectors]
    create_optimizer(model, lr=1e-2)
    assert all(a is b for a, b in zip(model.vectors, held, strict=True))
    assert_equal(model.values(), before)
    assert all(v.data_ptr() != old.data_ptr() for v, old in zip(model.vectors, views, strict=True))
    assert all(v.is_leaf and v.requires_grad for v in model.vectors)


def test_every_saver_writes_all_vectors_and_no_more(tmp_path: Path) -> None:
    model = Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    # one storage for each vector, of its own size: what id_tensor_storage() in accelerate, PEFT, transformers looks at
    storages = {(v.untyped_storage().data_ptr(), v.untyped_storage().nbytes()) for v in model.vectors}
    assert sorted(size for _, size in storages) == sorted(4 * n for n in SIZES)

    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    torch.save(model.vectors[0], tmp_path / "one.pt")
    saved = [load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "accelerate/model.safetensors")]
    for loaded in saved:
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert (tmp_path / "one.pt").stat().st_size < 4096

    loaded_model = Vectors(seed=1)
    loaded_model.load_state_dict(saved[0])
    assert_equal(loaded_model.values(), model.values())
    assert_equal(copy.deepcopy(model).values(), model.values())


def test_loading_model_weights_in_place_keeps_the_windows() -> None:
    model, other = Vectors(seed=0), Vectors(seed=1)
    optimizer = create_optimizer(model, lr=1e-2)
    model.load_state_dict(other.state_dict())
    other.targets = model.targets
    assert_equal(train(model, optimizer), train(other, create_optimizer(other, lr=1e-2)))


@pytest.mark.parametrize("call", ["step", "zero_grad"])
def test_cast_parameters_are_refused_by_name(call: str) -> None:
    model = Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    train(model, optimizer, range(1))
    model.bfloat16()
    with pytest.raises(QosoraError, match=r"vectors\.0 was moved after the optimizer was built .*before building"):
        getattr(optimizer, call)()


def copied_data(model: Vectors) -> None:
    model.vectors[0].data = model.vectors[0].data.clone()


def copied_as_by_to(model: Vectors) -> None:
    """`.to("cpu:0")` of accelerate: the data of parameters and, in place, of their gradients is rebound to copies."""
    model._apply(torch.clone)


@pytest.mark.parametrize("sizes", [SIZES, (PAGED_NUMEL, 300)])
@pytest.mark.parametrize("move", [copied_data, copied_as_by_to])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("moment", ["before backward", "before step"])
def test_copied_parameters_are_taken_back(sizes: tuple[int, ...], move: Any, steps: int, moment: str) -> None:
    model, reference = Vectors(sizes), Vectors(sizes)
    optimizer, theirs = create_optimizer(model, lr=1e-2), create_optimizer(reference, lr=1e-2)
    assert_equal(train(model, optimizer, range(steps)), train(reference, theirs, range(steps)))
    for step in (7, 8):
        optimizer.zero_grad()
        if moment == "before backward":
            move(model)
        model(step).backward()
        if moment == "before step":
            move(model)
        optimizer.step()
    assert_equal(model.values(), train(reference, theirs, range(7, 9)))


def test_two_optimizers_of_the_same_parameters() -> None:
    """As of torch's: each has its own states, and goes on from what the other has made."""
    model, reference = Vectors(), Vectors()
    mine = [create_optimizer(model, lr=1e-2, eps=1e-3), create_optimizer(model, lr=2e-2, eps=1e-3)]
    theirs = [torch.optim.AdamW(reference.parameters(), lr=lr, eps=1e-3, weight_decay=0) for lr in (1e-2, 2e-2)]
    for optimizers, trained in ((mine, model), (theirs, reference)):
        for step in range(4):
            train(trained, optimizers[step % 2], range(step, step + 1))
    for a, b in zip(model.values(), reference.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_model_to_the_same_place_is_fine() -> None:
    model, reference = Vectors(), Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    model.to("cpu").float()
    assert_equal(train(model, optimizer), train(reference, create_optimizer(reference, lr=1e-2)))


def test_frozen_parameters_are_refused() -> None:
    model = Vectors()
    with pytest.raises(ConfigError, match=r"frozen is frozen \(requires_grad=False\)"):
        PackedPagedOptimizer(model.named_parameters(), lr=1e-2)
    optimizer = create_optimizer(model, lr=1e-2)
    model(0).backward()
    model.vectors[1].requires_grad_(False)
    before = model.values()
    with pytest.raises(QosoraError, match=r"vectors\.1 was frozen"):
        optimizer.step()
    assert_equal(model.values(), before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([nn.Parameter(torch.ones(3, dtype=torch.float64))], "parameter 0 of group 0 is torch.float64"),
        ([nn.Parameter(torch.ones(3, device="meta"))], "meta device"),
        ([{"params": []}], "no trainable parameters"),
    ],
)
def test_bad_parameters(params: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackedPagedOptimizer(params, lr=1e-2)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        create_optimizer(nn.Linear(2, 2).requires_grad_(False), lr=1e-2)


def test_loading_fills_existing_buffers() -> None:
    model = Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    fresh = copy.deepcopy(optimizer.state_dict())
    start = copy.deepcopy(model.state_dict())
    expected = train(model, optimizer)
    addresses = [t.data_ptr() for t in optimizer.buffers[0].tensors().values()]
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer)
    optimizer.load_state_dict(saved)
    assert [t.data_ptr() for t in optimizer.buffers[0].tensors().values()] == addresses
    assert torch.equal(optimizer.state_dict()["state"][0]["state1"], saved["state"][0]["state1"])
    optimizer.load_state_dict(fresh)  # saved before the first step: as new
    model.load_state_dict(start)
    assert_equal(train(model, optimizer), expected)
