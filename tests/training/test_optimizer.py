"""The packed optimizer against per-tensor ones: the same numbers, states that resume, and Trainer's use of it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from linear_checks import grad
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from vectors_to_train import SIZES, Mixed, Vectors, assert_equal, train

from qosora.compat.bitsandbytes import is_paged
from qosora.errors import CheckpointError, ConfigError, QosoraError
from qosora.training.optimizer import OPTIMIZERS, PackedPagedOptimizer, create_optimizer, trainer_optimizer

NO_CUDA = not torch.cuda.is_available()
U32 = 2.0**-24  # unit roundoff of float32


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each update that bitsandbytes makes from here on, in order."""
    seen: list[int] = []

    def counted(op: Any) -> Any:
        def call(kind: str, g: Tensor, *args: Any, **options: Any) -> None:
            seen.append(g.numel())
            op(kind, g, *args, **options)

        return call

    for name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
        monkeypatch.setattr(bitsandbytes.functional, name, counted(getattr(bitsandbytes.functional, name)))
    return seen


# --- one flat tensor, the right numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_update_of_one_flat_tensor(name: str, updates: list[int]) -> None:
    model = Vectors((11_008, 4096, 128) * 60)  # 180 vectors
    optimizer = create_optimizer(model, lr=1e-3, optimizer=name)
    train(model, optimizer, range(3))
    assert updates == [60 * (11_008 + 4096 + 256)] * 3  # 128 is padded to 256


def adamw_float64(grads: list[Tensor], p: Tensor, rates: list[Any], decay: float) -> Tensor:
    """Loshchilov and Hutter's AdamW, in float64."""
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        p = p * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_per_tensor_adamw_over_50_steps(decay: float, seed: int) -> None:
    torch.manual_seed(seed)
    start = [torch.randn(n) for n in SIZES]
    grads = [[torch.randn(n) * 10.0 ** (i % 5 - 3) for i, n in enumerate(SIZES)] for _ in range(50)]
    mine, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        PackedPagedOptimizer(mine, lr=1e-2, weight_decay=decay),
        torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay, foreach=False),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50) for o in optimizers]
    rates = []
    for step in grads:
        rates.append(schedulers[0].get_last_lr()[0])
        for params, optimizer, scheduler in zip((mine, theirs), optimizers, schedulers, strict=True):
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
            scheduler.step()
    assert max(rates) > 100 * min(rates)  # the schedule reached the update, or the comparison below fails
    # Each step rounds p three times (decay, product, sum: 3 u |p|) and adds an update of size lr * |m| / sqrt(v) with a
    # relative error of about 20 roundings (moments decayed over ten steps, root, quotient, bias corrections).
    for a, b, p, *gs in zip(mine, theirs, start, *grads, strict=True):
        exact = adamw_float64(gs, p, rates, decay)
        bound = U32 * (50 * 3 * (p.abs() + sum(rates)) + 20 * 4 * sum(rates))
        assert ((a - exact).abs() <= bound).all()
        assert ((b - exact).abs() <= bound).all()
        assert ((a - b).abs() <= 2 * bound).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_bitsandbytes_on_the_separate_vectors(name: str, seed: int) -> None:
    # Bit for bit, in 8 bits too: alignment keeps every 256-element block within one vector.
    sizes = (*SIZES, 5000)
    packed, separate = Vectors(sizes, seed), Vectors(sizes, seed)
    kind = OPTIMIZERS[name]
    args = {"optim_bits": kind.bits, "betas": kind.betas, "min_8bit_size": 0, "weight_decay": 0.01}
    plain = kind.cls(list(separate.vectors), lr=1e-2, **args)
    mine = train(packed, create_optimizer(packed, lr=1e-2, optimizer=name, weight_decay=0.01))
    assert_equal(mine, train(separate, plain))


def test_default_weight_decay_is_zero() -> None:
    model = Vectors()
    optimizer = create_optimizer(model, lr=1e-2)
    before = model.values()
    optimizer.step()  # gradients are zero
    assert_equal(model.values(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_stays_out_of_the_way(name: str) -> None:
    model = Vectors((*SIZES, 5000))
    optimizer = create_optimizer(model, lr=1e-2, optimizer=name, weight_decay=0.1)
    train(model, optimizer)
    (buffer,) = optimizer.buffers
    inside = torch.zeros_like(buffer.flat, dtype=torch.bool)
    offset = 0
    for p in buffer.params:
        assert p.data_ptr() == buffer.flat[offset:].data_ptr()
        inside[offset : offset + p.numel()] = True
        offset += -(-p.numel() // 256) * 256
    assert buffer.grad is not None
    assert buffer.grad[~inside].eq(0).all()
    # In 8 bits on the CPU, bitsandbytes 0.50 requantizes a zero moment to code 131, 4e-5 of the block's largest.
    assert OPTIMIZERS[name].bits == 8 or buffer.flat[~inside].eq(0).all()


def test_no_compilation_on_the_cpu() -> None:
    torch._dynamo.utils.counters.clear()
    for name in OPTIMIZERS:
        model = Vectors((*SIZES, 5000))
        train(model, create_optimizer(model, lr=1e-2, optimizer=name), range(2))
    assert not torch._dynamo.utils.counters["stats"]


def test_scheduler_reaches_the_update_and_groups_have_their_own_rates() -> None:
    model = Vectors((300, 300))
    groups = [{"params": [model.vectors[0]]}, {"params": [model.vectors[1]], "lr": 1e-3}]
    optimizer = PackedPagedOptimizer(groups, lr=1e-2)
    before = model.values()
    train(model, optimizer, range(1))
    steps = [(a - b).abs().max().item() for a, b in zip(model.values(), before, strict=True)]
    assert steps == pytest.approx([1e-2, 1e-3], rel=1e-4)  # AdamW's first step is lr * sign(g)
    optimizer.param_groups[0]["lr"] = 0.0
    middle = model.values()
    train(model, optimizer, range(1, 2))
    assert torch.equal(model.vectors[0], middle[0])
    assert not torch.equal(model.vectors[1], middle[1])


# --- gradients ----------------------------------------------------------------------------------------------------


def test_accumulation_and_clipping() -> None:
    model, reference = Vectors(), Vectors()
    optimizer, plain = create_optimizer(model, lr=1e-2), torch.optim.AdamW(reference.vectors, lr=1e-2, weight_decay=0)
    for step in range(5):
        norms = []
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            for micro in range(3):
                (m(step + micro) / 3).backward()
            norms.append(nn.utils.clip_grad_norm_(m.parameters(), 0.1))
            assert torch.stack([v.grad.norm() for v in m.vectors]).norm() <= 0.1 * (1 + 1e-5)
            o.step()
        assert norms[0] == pytest.approx(norms[1].item(), rel=1e-5)
    for a, b in zip(model.vectors, reference.vectors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_closure() -> None:
    model, reference = Vectors(), Vectors()
    optimizer = create_optimizer(model, lr=1e-2)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    assert optimizer.step(closure) == reference().item()
    assert_equal(model.values(), train(reference, create_optimizer(reference, lr=1e-2), range(1)))


def test_accelerate_wraps_it() -> None:
    model, reference = Vectors(), Vectors()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped_model, wrapped = accelerator.prepare(model, create_optimizer(model, lr=1e-2))
    plain = create_optimizer(reference, lr=1e-2)
    for step in range(6):
        with accelerator.accumulate(wrapped_model):
            accelerator.backward(wrapped_model(step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped_model.parameters(), 1.0)
            wrapped.step()
            wrapped.zero_grad()
    for step in range(0, 6, 2):
        plain.zero_grad()
        (reference(step) / 2).backward()
        (reference(step + 1) / 2).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
    assert_equal(model.values(), reference.values())


# --- groups, dtypes, large parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_parameters_have_a_group_and_buffers_of_their_own(name: str, updates: list[int]) -> None:
    model = Mixed()
    optimizer = create_optimizer(model, lr=1e-2, modules_to_save_lr=2e-3, optimizer=name)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-3]
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["s", "o"], ["embedding", "head.modules_to_save.weight", "head.modules_to_save.bias"]]
    before = copy.deepcopy(model.state_dict())
    address = model.embedding.data_ptr()
    for _ in range(3):
        optimizer.zero_grad()
        assert model.embedding.grad is None  # a large parameter is not packed: torch's own semantics
        model().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert torch.equal(grad(model.embedding), torch.zeros(256, 400))
    assert sorted(updates) == sorted([256 + 512, 256 + 256, 102_400] * 3)
    assert model.embedding.data_ptr() == address
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        moved = (value.float() - before[key].float()).abs().max().item()
        assert moved > 0
        # three steps of about lr each; below 0.5, bf16 rounds each by at most 1e-3 (and would swallow steps of 1e-4)
        assert moved <= (0.04 if key in "so" else 3 * (2e-3 + 1e-3) + 1e-4), key


def test_large_parameter_equals_torch() -> None:
    model, reference = Mixed(), Mixed()
    optimizer = PackedPagedOptimizer([model.embedding], lr=1e-2)
    plain = torch.optim.AdamW([reference.embedding], lr=1e-2, weight_decay=0)
    for _ in range(3):
        for m, o in ((model, optimizer), (reference, plain)):
            m.zero_grad()
            m().backward()
            o.step()
    torch.testing.assert_close(model.embedding, reference.embedding, rtol=1e-6, atol=1e-6)


def test_group_can_be_added_later() -> None:
    model = Vectors((300, 200))
    optimizer = PackedPagedOptimizer([model.vectors[0]], lr=1e-2)
    optimizer.add_param_group({"params": [model.vectors[1]], "lr": 1e-3})
    reference = Vectors((300, 200))
    groups = [{"params": [reference.vectors[0]]}, {"params": [reference.vectors[1]], "lr": 1e-3}]
    assert_equal(train(model, optimizer), train(reference, PackedPagedOptimizer(groups, lr=1e-2)))


# --- references, saving, moving -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer must be one of paged_adamw_32bit.*got 'adamw'"),
        ({"lr": -1.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": "1e-3"}, "lr must be a finite number of at least 0, got '1e-3'"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"eps": -1e-8, "weight_decay": -0.1}, "(?s)2 problems.*eps must be.*weight_decay must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_optimizer(Vectors(), **{"lr": 1e-2, **options})


def test_cpu_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = Mixed()
    optimizer = create_optimizer(model, lr=1e-2)
    for _ in range(2):
        model().backward()
        optimizer.step()
    lines = [r.message for r in caplog.records if r.name == "qosora"]
    assert lines == [
        "paged_adamw_32bit: optimizer states are ordinary tensors, not paged, as the parameters are on cpu"
    ]


# --- optimizer state ----------------------------------------------------------------------------------------------


def round_trip(state: Any, path: Path) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("build", [lambda seed: Vectors((*SIZES, 5000), seed), Mixed], ids=["vectors", "mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bit_identical(name: str, build: Any, tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
            scheduler.step()
        return model.state_dict()

    def make(seed: int) -> tuple[nn.Module, PackedPagedOptimizer, Any]:
        model = build(seed)
        optimizer = create_optimizer(model, lr=1e-2, optimizer=name, weight_decay=0.01)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    whole, first, second = make(0), make(0), make(1)
    if isinstance(whole[0], Vectors):
        second[0].targets = whole[0].targets  # type: ignore[assignment]
    expected = run(*whole, 10)
    run(*first, 4)
    saved: Any = round_trip([part.state_dict() for part in first], tmp_path / "state.pt")
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    again = second[1].state_dict()
    assert again["param_groups"] == saved[1]["param_groups"]
    assert again["layout"] == saved[1]["layout"]
    for i, state in saved[1]["state"].items():
        assert state.keys() == again["state"][i].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(again["state"][i][k])) for k, v in state.items())
    got = run(*second, 6)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_loading_goes_through_the_buffers_that_bitsandbytes_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the gpu tests see on a device, here with buffers that carry only the mark of a paged one.
    made: list[Tensor] = []

    def paged_buffer(self: Any, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        made.append(torch.zeros_like(p, dtype=dtype))
        made[-1].is_paged = True  # type: ignore[attr-defined]
        return made[-1]

    assert not is_paged(torch.zeros(1))  # its first call looks at what bitsandbytes has
    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", paged_buffer)
    model, other = Vectors(), Vectors()
    optimizer, resumed = create_optimizer(model, lr=1e-2), create_optimizer(other, lr=1e-2)
    train(model, optimizer)
    state = round_trip(optimizer.state_dict(), tmp_path / "state.pt")
    # The mark would survive torch.save, and bitsandbytes would prefetch memory that is not managed.
    assert not any(hasattr(t, "is_paged") for t in state["state"][0].values())
    made.clear()
    resumed.load_state_dict(state)
    tensors = resumed.buffers[0].tensors()
    assert [id(t) for t in tensors.values()] == [id(t) for t in made]
    assert resumed.memory().paged_bytes == resumed.memory().state_bytes > 0
    assert all(torch.equal(tensors[key], state["state"][0][key]) for key in tensors)


def test_state_onto_other_vectors_is_refused() -> None:
    def saved(model: nn.Module, **options: Any) -> dict[str, Any]:
        optimizer = create_optimizer(model, lr=1e-2, **options)
        model().backward()
        optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    model = Vectors((300, 200))
    optimizer = create_optimizer(model, lr=1e-2)
    damaged = saved(Vectors((300, 200)))
    del damaged["state"][0]["state2"]
    cases = [
        (saved(Vectors((300, 201))), r"it has vectors\.1 \[201\] where this optimizer has vectors\.1 \[200\]"),
        (saved(Vectors((300, 200, 5))), "it has 3 parameters where this optimizer has 2"),
        (saved(Mixed()), "it has 3 buffers of parameters, this optimizer has 1"),
        (saved(Vectors((300, 200)), optimizer="paged_lion_32bit"), "saved by paged_lion_32bit, this is paged_adamw"),
        (torch.optim.AdamW(model.vectors).state_dict(), "not saved by PackedPagedOptimizer"),
        (damaged, "state2 of buffer 0 are missing or of another size"),
    ]
    for state, message in cases:
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(state)
    reference = Vectors((300, 200))
    assert_equal(train(model, optimizer), train(reference, create_optimizer(reference, lr=1e-2)))


# --- with Trainer and PEFT ----------------------------------------------------------------------------------------


LENGTH, VOCABULARY = 8, 32


class Scale(nn.Module):
    """A frozen linear with two trained fp32 vectors, as an OSoRA layer has."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.s, self.o = nn.Parameter(torch.ones(base.in_features)), nn.Parameter(torch.ones(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.o * self.base(self.s * x)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM(config)


def scaled_llama(seed: int = 0) -> LlamaForCausalLM:
    model = tiny_llama(seed).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, Scale(module))
    assert sum(p.requires_grad for p in model.parameters()) == 28
    return model


def examples(n: int = 32) -> list[dict[str, Tensor]]:
    rows = torch.randint(VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    steps = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2}
    rates = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5}
    batch = {"per_device_train_batch_size": 2}
    return TrainingArguments(output_dir=str(folder), **{**fixed, **steps, **rates, **batch, **options})


def ways(way: str, model: nn.Module, args: TrainingArguments, name: str) -> dict[str, Any]:
    if way == "instance":
        return {"optimizers": (create_optimizer(model, lr=1e-2, optimizer=name), None)}
    if way == "class":
        return {"optimizer_cls_and_kwargs": (PackedPagedOptimizer, {"lr": 1e-2, "optimizer": name})}
    return {"optimizer_cls_and_kwargs": trainer_optimizer(args, optimizer=name)}


class Watch(TrainerCallback):
    """What the trainer's optimizer holds before each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        assert isinstance(inner, PackedPagedOptimizer)
        self.sizes.append(len(inner.buffers))


@pytest.mark.parametrize("way", ["instance", "class", "factory"])
@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_lion_8bit"])
@pytest.mark.slow
def test_trainer_trains_saves_and_resumes_bit_identically(
    name: str, way: str, tmp_path: Path, updates: list[int]
) -> None:
    def trainer(folder: str, seed: int = 0) -> Trainer:
        model, args = scaled_llama(seed), arguments(tmp_path / folder)
        return Trainer(model, args, train_dataset=examples(), callbacks=[watch], **ways(way, model, args, name))

    watch = Watch()
    whole = trainer("whole")
    start = {k: v.clone() for k, v in whole.model.state_dict().items()}
    losses = whole.train().training_loss
    assert watch.sizes == [1] * 8
    assert len(updates) == 8
    assert len(set(updates)) == 1
    end = whole.model.state_dict()
    for key, value in end.items():
        assert torch.equal(value, start[key]) == (not key.endswith((".s", ".o"))), key
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == end.keys()

    resumed = trainer("resumed", seed=1)  # other weights: all must come from the checkpoint
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(updates) == 12
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, end[key]), key
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert len(set(rates)) > 4
    assert losses > 0


@pytest.mark.slow
def test_trainer_and_per_tensor_adamw_agree(tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> dict[str, Tensor]:
        args = arguments(tmp_path / folder, save_strategy="no", optim="adamw_torch")
        model = scaled_llama()
        given = {"optimizer_cls_and_kwargs": trainer_optimizer(args)} if options.get("packed") else {}
        Trainer(model, args, train_dataset=examples(), **given).train()
        return model.state_dict()

    packed, plain = run("packed", packed=True), run("plain")
    for key in packed:
        torch.testing.assert_close(packed[key], plain[key], rtol=1e-5, atol=1e-5)


def test_trainer_optimizer_takes_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.25, adam_beta2=0.95, adam_epsilon=1e-6, learning_rate=3e-3)
    model = scaled_llama()
    given = trainer_optimizer(args, weight_decay=0.5)
    optimizer = Trainer(model, args, train_dataset=examples(), optimizer_cls_and_kwargs=given).create_optimizer()
    (group,) = optimizer.param_groups
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [3e-3, (0.9, 0.95), 1e-6, 0.5]
    assert group["param_names"][0] == "model.layers.0.self_attn.q_proj.s"


def test_peft_adapter_saves_and_loads(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    optimizer = create_optimizer(model, lr=1e-2, modules_to_save_lr=1e-3)
    for batch in examples(3):
        optimizer.zero_grad()
        model(**{k: v[None] for k, v in batch.items()}).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * values + 8192
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    expected = dict(model.named_parameters())
    for key, value in loaded.named_parameters():
        assert torch.equal(value, expected[key]), key


# --- on a GPU -----------------------------------------------------------------------------------------------------


LARGE = (11_008, 4096, 128) * 10  # 153,600 elements with padding: over bitsandbytes' threshold


def paged(optimizer: PackedPagedOptimizer) -> dict[str, bool]:
    tensors = optimizer.buffers[0].tensors()
    return {key: getattr(t, "is_paged", False) for key, t in tensors.items() if key.startswith("state")}


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="paged states need a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gpu_state_is_paged_and_stays_paged(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Vectors(LARGE, device="cuda")
    optimizer = create_optimizer(model, lr=1e-2, optimizer=name)
    train(model, optimizer, range(4))
    keys = {"state1", "state2"} if "adamw" in name else {"state1"}
    assert paged(optimizer) == dict.fromkeys(keys, True)
    use = optimizer.memory()
    assert use.paged_bytes == len(keys) * OPTIMIZERS[name].bits // 8 * optimizer.buffers[0].flat.numel()
    assert not [r for r in caplog.records if r.name == "qosora"]

    state = round_trip(optimizer.state_dict(), tmp_path / "state.pt")
    other = Vectors(LARGE, device="cuda")
    other.load_state_dict(model.state_dict())
    resumed = create_optimizer(other, lr=1e-2, optimizer=name)
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    resumed.load_state_dict(state)
    # Only what is not paged (absmax, maps) may have appeared on the GPU; the allocator rounds up to 512 bytes.
    unpaged = resumed.memory().state_bytes - resumed.memory().paged_bytes
    assert torch.cuda.max_memory_allocated() - allocated <= 2 * unpaged + 16 * 512
    assert paged(resumed) == dict.fromkeys(keys, True)
    for key, value in state["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state_dict()["state"][0][key]).cpu()), key
    assert_equal(train(other, resumed, range(4, 8)), train(model, optimizer, range(4, 8)))


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="paged states need a CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gpu_paged_equals_unpaged(name: str, updates: list[int]) -> None:
    model, reference = Vectors(LARGE, device="cuda"), Vectors(LARGE, device="cuda")
    optimizer = create_optimizer(model, lr=1e-2, optimizer=name, weight_decay=0.01)
    unpaged = create_optimizer(reference, lr=1e-2, optimizer=name, weight_decay=0.01)
    unpaged.buffers[0].inner.is_paged = False
    mine = train(model, optimizer)
    assert len(updates) == 10
    assert_equal(mine, train(reference, unpaged))
    assert not any(paged(unpaged).values())


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_gpu_equals_torch_adamw() -> None:
    model, reference = Vectors(LARGE, device="cuda"), Vectors(LARGE, device="cuda")
    mine = train(model, create_optimizer(model, lr=1e-2, weight_decay=0.01), range(50))
    theirs = train(reference, torch.optim.AdamW(reference.vectors, lr=1e-2, weight_decay=0.01), range(50))
    for a, b in zip(mine, theirs, strict=True):
        # bitsandbytes may decay after the update instead of before: a difference of lr^2 * decay a step
        torch.testing.assert_close(a, b, rtol=2e-5, atol=50 * 1e-4 * 0.01)


@pytest.mark.gpu
@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_gpu_moving_the_model_is_refused_and_a_cpu_state_loads() -> None:
    model = Vectors(LARGE)
    optimizer = create_optimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    model.cuda()
    with pytest.raises(QosoraError, match=r"vectors\.0 was moved .*cuda"):
        optimizer.step()
    moved = create_optimizer(model, lr=1e-2)
    moved.load_state_dict(optimizer.state_dict())
    assert paged(moved) == {"state1": True, "state2": True}
