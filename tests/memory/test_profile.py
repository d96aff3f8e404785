"""What is measured on the CPU is what was planned, and what the trainer does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from kinds import CLASSIFIERS, SEEING
from tiny import load, make_base, make_checkpoint, write_jsonl
from transformers import (
    BartConfig,
    DbrxConfig,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    PreTrainedConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from qosora.cli import main
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError, DataError
from qosora.layers import vocabulary
from qosora.layers.stacks import hardest
from qosora.memory import step
from qosora.memory.options import StepOptions
from qosora.memory.plan import plan
from qosora.memory.profile import profile, random_model
from qosora.memory.shapes import model_config

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(folder / name, name) for name in FAMILIES}


@pytest.mark.filterwarnings("ignore:.*runs on the CPU")
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_planned_equals_measured(bases: dict[str, Path], name: str, batch_size: int, checkpointing: bool):
    found = profile(
        bases[name], batch_size=batch_size, seq_len=48, steps=1, gradient_checkpointing=checkpointing, precision="bf16"
    )
    assert found.planned is not None
    assert found.difference == pytest.approx(0, abs=0.01)
    for phase, measured in found.live.phases.items():
        assert found.planned.phases[phase] == pytest.approx(measured, rel=0.01), phase
    for name, measured in found.live.rows.items():
        assert found.planned.rows[name] == pytest.approx(measured, abs=0.01 * found.measured_bytes), name


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("kind", [*CLASSIFIERS, *SEEING])
def test_planned_equals_measured_to_the_byte_for_other_kinds(kind: str, checkpointing: bool):
    """Classifiers with their head, and models that see, on text."""
    config = (CLASSIFIERS | SEEING)[kind]
    options: dict[str, Any] = {"gradient_checkpointing": checkpointing, "precision": "fp32"}
    storage = QosoraConfig(rank=16)
    model = random_model(config, storage, StepOptions(device="cpu", **options))
    model.config.quantization_config = storage
    found = profile(model, batch_size=3, seq_len=40, steps=1, **options)
    assert found.planned is not None
    assert found.planned.allocated_bytes == found.measured_bytes
    assert found.planned.phases == found.live.phases


_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1,
}  # fmt: skip
#: Experts that a module holds in one tensor, or the loader puts into one; heads whose values are narrower than their
#: keys.
_MIXTURES: dict[str, PreTrainedConfig] = {
    "gpt_oss": GptOssConfig(**_SIZES),
    "llama4": Llama4TextConfig(**_SIZES, intermediate_size_mlp=40),
    "deepseek_v3": DeepseekV3Config(
        **{k: v for k, v in _SIZES.items() if k not in ("head_dim", "num_key_value_heads")}, num_key_value_heads=4,
        n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1, n_group=2,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "dbrx": DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=128, pad_token_id=1, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    "longcat": LongcatFlashConfig(
        vocab_size=128, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_layers=1,
        ffn_hidden_size=48, expert_ffn_hidden_size=24, n_routed_experts=4, zero_expert_num=0, moe_topk=2,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, pad_token_id=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("name", _MIXTURES)
def test_mixtures_take_no_more_than_planned(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch):
    """Llama 4's experts get tokens of equal number; of the others the router is told what the plan assumes."""

    def routed(self: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        *others, chosen = plain(self, *args)
        counts = torch.tensor(hardest(len(chosen), chosen.shape[1], 4))
        return (*others, torch.arange(4).repeat_interleave(counts).view(*chosen.shape[::-1]).T)

    options: dict[str, Any] = {"gradient_checkpointing": checkpointing, "precision": "fp32"}
    storage = QosoraConfig(rank=8)
    model = random_model(_MIXTURES[name], storage, StepOptions(device="cpu", **options))
    model.config.quantization_config = storage
    routers = {type(m) for n, m in model.named_modules() if n.endswith((".mlp.router", ".mlp.gate", ".ffn"))}
    for router in routers if name != "llama4" else ():
        method = "route_tokens_to_experts" if name == "dbrx" else "forward"
        plain = getattr(router, method)
        monkeypatch.setattr(router, method, routed)
    found = profile(model, batch_size=3, seq_len=40, steps=1, **options)
    assert found.planned is not None
    for phase, measured in found.live.phases.items():
        assert measured <= found.planned.phases[phase] <= 1.01 * measured, phase


def test_a_model_that_cannot_be_traced_is_measured_without_a_plan(caplog: pytest.LogCaptureFixture):
    """BART's classifiers look for the end of each text, in a way that has no form without values."""
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=96, architectures=["BartForSequenceClassification"],
    )  # fmt: skip
    storage = QosoraConfig(rank=8)
    model = random_model(config, storage, StepOptions(device="cpu", precision="fp32"))
    model.config.quantization_config = storage
    found = profile(model, batch_size=2, seq_len=24, steps=1)
    assert found.planned is None
    assert found.difference is None
    assert found.measured_bytes > 0
    assert "BartForSequenceClassification cannot be traced" in caplog.text


def test_what_writes_no_text_is_refused():
    with pytest.raises(CheckpointError, match="takes language models that write on"):
        plan(BartConfig(architectures=["BartForConditionalGeneration"]), grid=False)


@pytest.mark.parametrize(
    "options",
    [
        {"chunked_loss": False, "vectors": "o", "optimizer": "paged_lion_8bit"},
        {"attn_implementation": "eager", "optimizer": "paged_adamw_8bit", "padding": False},
        {"packing": True, "seq_len": 24},
        {"tile_length": 16},
        {"tile_length": 0},
        {"orpo": True},
        {"orpo": True, "gradient_checkpointing": False, "padding": False},
    ],
)
def test_planned_equals_measured_with_options(bases: dict[str, Path], options: dict[str, Any]):
    found = profile(bases["llama"], **{"batch_size": 2, "seq_len": 48, "steps": 1, **options})
    assert found.planned is not None
    assert found.planned.phases == pytest.approx(found.live.phases, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*runs on the CPU")
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": False}, {"chunked_loss": False}], ids=str)
@pytest.mark.parametrize("embeddings", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_planned_equals_measured_with_quantized_embeddings(
    name: str, embeddings: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vocabulary, "PANEL", 200)
    monkeypatch.setattr(vocabulary, "MERGED", 64)
    base = make_base(tmp_path, name, QosoraConfig(rank=8, blocksize=32, embeddings=embeddings), vocab_size=700)
    found = profile(base, batch_size=2, seq_len=32, steps=1, precision="fp32", **options)
    assert found.planned is not None
    assert found.planned.rows == found.live.rows
    assert found.live.phases == found.planned.phases


@pytest.mark.filterwarnings("ignore:.*runs on the CPU")
@pytest.mark.parametrize("chunked_loss", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
@pytest.mark.slow
def test_autocast_and_a_scaled_loss_take_nothing(
    bases: dict[str, Path], name: str, chunked_loss: bool, monkeypatch: pytest.MonkeyPatch
):
    """As Trainer in fp16: the forward in autocast, its outputs in float32, the loss scaled, gradients unscaled."""
    scaler, own_loss, clip = torch.amp.GradScaler("cpu"), step._loss, torch.nn.utils.clip_grad_norm_
    autocast = []

    def loss(model: Any, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        if batch["input_ids"].is_meta:
            return own_loss(model, batch, kind)
        if "forward" not in vars(model):
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.float16)(model.forward))
            model.get_input_embeddings().register_forward_hook(
                lambda *_: autocast.append(torch.is_autocast_enabled("cpu"))
            )
        return scaler.scale(own_loss(model, batch, kind))

    def unscale_and_clip(params: Any, norm: float) -> torch.Tensor:
        params = [p for p in params if p.requires_grad]
        if not params[0].is_meta:
            scaler.unscale_(torch.optim.SGD(params, lr=1))
            scaler.update()
        return clip(params, norm)

    monkeypatch.setattr(step, "_loss", loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", unscale_and_clip)
    found = profile(bases[name], batch_size=2, seq_len=48, steps=1, precision="fp16", chunked_loss=chunked_loss)
    assert all(autocast)
    assert len(autocast) == 3
    assert found.planned is not None
    for phase, measured in found.live.phases.items():
        assert measured <= found.planned.phases[phase] * 1.01, phase
    assert found.difference == pytest.approx(0, abs=0.01)


def _route(monkeypatch: pytest.MonkeyPatch, experts: Callable[[int, int], list[int]]) -> None:
    """Let routers choose for token t, where there are e experts, those that `experts(t, e)` gives."""
    for kind in (MixtralTopKRouter, Qwen3MoeTopKRouter):

        def forward(self: Any, x: torch.Tensor, own: Any = kind.forward) -> tuple[torch.Tensor, ...]:
            logits, weights, _ = own(self, x)
            return logits, weights, torch.tensor([experts(t, self.num_experts) for t in range(len(weights))])

        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.slow
def test_planned_equals_measured_with_the_experts_assumed(
    bases: dict[str, Path], name: str, batch_size: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    _route(monkeypatch, lambda t, e: [e - 1, t % (e - 1)])
    found = profile(bases[name], batch_size=batch_size, seq_len=48, steps=1, gradient_checkpointing=checkpointing)
    assert found.planned is not None
    assert found.planned.phases == pytest.approx(found.live.phases, rel=0.01)
    for row, measured in found.live.rows.items():
        assert found.planned.rows[row] == pytest.approx(measured, abs=0.01 * found.measured_bytes), row


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize(
    "experts",
    [
        None,
        lambda t, e: [t % e, (t + 1) % e],
        lambda t, e: [0, 1],
        lambda t, e: [e - 2, e - 1],
        lambda t, e: [0, 1 + t % (e - 1)],
        lambda t, e: [0, e - 1] if t % 2 else [1, e - 1],
    ],
    ids=["random", "even", "first two", "last two", "most to the first", "three"],
)
@pytest.mark.slow
def test_no_choice_of_experts_takes_more_than_planned(
    bases: dict[str, Path], experts: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    if experts is not None:
        _route(monkeypatch, experts)
    found = profile(bases["mixtral"], batch_size=1, seq_len=48, steps=1, gradient_checkpointing=checkpointing)
    assert found.planned is not None
    for phase, measured in found.live.phases.items():
        assert measured <= found.planned.phases[phase], phase
    assert found.difference is not None
    assert found.difference < 0.1


def test_data_gives_the_longest_examples(tmp_path: Path):
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "llama", "llama-text"), QosoraConfig(rank=16))
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (3, 30, 10, 20)]
    data = str(write_jsonl(tmp_path / "data.jsonl", rows))
    found = profile(base, data=data, batch_size=2, steps=1, compare=False)
    assert (found.batch.size, found.batch.length, found.batch.padding) == (2, 33, True)
    with pytest.raises(DataError, match="has 4 examples, fewer than the batch size 5"):
        profile(base, data=data, batch_size=5)


def test_a_loaded_base_and_random_weights(bases: dict[str, Path]):
    model = load(bases["llama"], dtype=torch.float32)
    found = profile(model, batch_size=1, seq_len=16, steps=1)
    assert found.difference == pytest.approx(0, abs=0.01)
    assert found.measured_bytes == found.live.allocated_bytes
    config = model_config(bases["llama"])
    shape = random_model(config, QosoraConfig(rank=8), StepOptions(precision="fp32", device="cpu"))
    assert {n: p.shape for n, p in shape.named_parameters()} == {
        n: p.shape for n, p in load(bases["llama"]).named_parameters()
    }


def test_random_weights_keep_ties(tmp_path: Path):
    config = model_config("qwen3-0.6b")
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64})
    model = random_model(config, QosoraConfig(rank=8), StepOptions(precision="fp32", device="cpu"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert not any(p.requires_grad for p in model.parameters())


def test_options_that_cannot_be(bases: dict[str, Path]):
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        profile(bases["llama"], steps=0)
    with pytest.raises(ConfigError, match="seq_len 65 is longer than the model's 64 positions"):
        profile(bases["llama"], seq_len=65)
    with pytest.raises(ConfigError, match="packing leaves nothing to pad"):
        profile(bases["llama"], packing=True, padding=True)
    with pytest.raises(ConfigError, match="precision must be one of"):
        profile(bases["llama"], precision="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="there is no GPU"):
            profile(bases["llama"], activation_offloading=True, seq_len=16)


@pytest.mark.gpu
@pytest.mark.parametrize("offloading", [False, True])
def test_on_a_gpu(bases: dict[str, Path], offloading: bool):
    found = profile(bases["llama"], batch_size=2, seq_len=64, steps=1, activation_offloading=offloading)
    assert list(found.allocated_bytes) == ["forward", "loss", "backward", "optimizer"]
    assert found.live.allocated_bytes <= found.measured_bytes <= found.reserved_bytes <= found.device_used_bytes
    assert found.device == torch.cuda.get_device_name()
    # What CUDA counts besides live tensors: cuBLAS' workspaces and rounding, with which small tensors differ most
    assert found.planned is not None
    # and, where activations are offloaded, a layer's input more or less that is on its way at the peak
    layer_input = 2 * 64 * 32 * 2 * offloading
    live = found.live.rows["saved activations"]
    assert found.planned.rows["saved activations"] == pytest.approx(live, rel=0.2, abs=layer_input + 1024)


def test_command(bases: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    args = ["profile", str(bases["llama"]), "--seq-len", "16", "--batch-size", "1", "--steps", "1"]
    assert main(args) == 0
    text = capsys.readouterr().out
    for part in ("base residual", "planned", "tokens/s", "resident memory"):
        assert part in text
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert abs(found["difference"]) < 0.01
    assert found["tokens_per_second"] > 0
