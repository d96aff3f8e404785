"""The planner against counts by hand, its interpolation, search and advice, its errors and its command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import make_base
from transformers import Gemma2Config, MixtralConfig

from qosora.cli import main
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError, QosoraError
from qosora.memory.cards import ATTAINED, LINK, TFLOPS, the_card
from qosora.memory.options import Batch, StepOptions
from qosora.memory.plan import OUTSIDE, _Data, _Planner, plan
from qosora.memory.predict import TracedModel
from qosora.memory.shapes import SHAPES, model_config

#: Tiles of few tokens make tracing slow, so batches and the memory that they have are small.
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024,
        "model_type": "llama"}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


# ---- counted by hand ----


def four_bits(numel: int) -> float:
    """NF4 in blocks of 64, their scales in 8 bits, those in blocks of 256 in float32."""
    return numel / 2 + numel / 64 + 4 * math.ceil(numel / 64 / 256)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("llama-2-7b", False), ("llama-3.1-8b", False), ("mistral-7b", False), ("qwen3-4b", False), ("phi-3-mini", True)],
)
def test_weights_checkpoints_and_logits_counted_by_hand(name: str, fused: bool):
    c, rank, tokens = SHAPES[name], 128, 2048
    hidden, wide, layers, vocab = (
        c[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    head = c.get("head_dim", hidden // c["num_attention_heads"])
    q, kv = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    shapes = [(q + 2 * kv, hidden), (hidden, q), (2 * wide, hidden), (hidden, wide)]  # as Phi-3 has them
    if not fused:
        shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (wide, hidden), (wide, hidden), (hidden, wide)]
    base = layers * sum(four_bits(m * n) for m, n in shapes)
    factors = layers * sum(four_bits(rank * m) + four_bits(rank * n) + 4 * (m + n + rank) for m, n in shapes)
    vectors = layers * sum(m + rank for m, n in shapes)
    embeddings = vocab * hidden * 2 * (1 if c.get("tie_word_embeddings") else 2)
    checkpoints = layers * tokens * hidden * 2
    logits = 12 * tokens * vocab  # 16 bits, float32, and float32 of the softmax; then its gradient in place of one

    found = plan(name, rank=rank, batch_size=1, seq_len=tokens, chunked_loss=False, grid=False, compare=False)
    usage = found.usage
    assert found.trained_parameters == vectors
    assert usage.rows["base residual"] == pytest.approx(base, rel=1e-4)
    assert usage.rows["factors"] == pytest.approx(factors, rel=1e-3)
    assert usage.rows["embeddings and head"] == embeddings
    assert usage.rows["logits and loss"] == pytest.approx(logits, rel=1e-3)
    assert usage.phase == "loss"
    by_hand = base + factors + 8 * vectors + embeddings + checkpoints + logits
    assert usage.allocated_bytes == pytest.approx(by_hand, rel=0.02)


def test_rows_add_up_and_every_assumption_is_told():
    found = plan("llama-3.1-8b", batch_size=1, seq_len=2048, gpu="RTX 4090", grid=False)
    for usage in (found.usage, found.qlora):
        assert usage is not None
        assert sum(usage.rows.values()) == usage.total_bytes
        assert usage.total_bytes - sum(usage.rows[name] for name in OUTSIDE) == usage.allocated_bytes
    assert found.verdict == "fits"
    assert any("(not measured)" in text for text in found.assumptions)
    assert found.usage.phase == "backward"
    assert found.usage.layer == 31
    assert found.usage.phases["backward"] == found.usage.allocated_bytes


def test_checkpointing_and_chunked_loss_save_memory(tiny: Path):
    def peak(**options: Any) -> int:
        return plan(tiny, seq_len=512, grid=False, compare=False, **options).usage.allocated_bytes

    assert peak() < peak(gradient_checkpointing=False) < peak(gradient_checkpointing=False, attn_implementation="eager")
    assert peak() < peak(precision="fp32")
    assert peak(activation_offloading=True, gradient_checkpointing=False) < peak(gradient_checkpointing=False)


# ---- other shapes ----


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (Batch(1, 2048), {}),
        (Batch(3, 512), {"gradient_checkpointing": False}),
        (Batch(3, 768, padding=True), {}),
        (Batch(2, 768, packing=True), {}),
        (Batch(1, 1500), {"tile_length": 512}),
        (Batch(2, 1280), {"attn_implementation": "eager"}),
    ],
)
@pytest.mark.parametrize("window", [None, 600])
def test_interpolated_shapes_are_near_the_traced_ones(batch: Batch, options: dict[str, Any], window: int | None):
    config = model_config("gemma-3-1b")
    config.update({**TINY, "head_dim": 16, "sliding_window": window or 10**6, "num_hidden_layers": 2})
    config.max_position_embeddings = 8192
    config.layer_types = ["full_attention" if window is None else "sliding_attention"] * 2
    planner = _Planner(config, QosoraConfig(rank=8), StepOptions(**options), the_card(memory="8GiB"), _Data())
    assert planner.total(batch) == pytest.approx(planner.usage(batch).total_bytes, rel=2e-3)


@pytest.mark.slow
def test_the_largest_that_fits_is_the_largest(tiny: Path):
    found = plan(tiny, batch_size=2, seq_len=256, gpu_memory="560MiB", compare=False)
    assert found.card.memory_bytes == 560 * 2**20
    assert found.largest_batch
    assert found.longest_sequence
    for batch, length in ((found.largest_batch, 256), (2, found.longest_sequence)):
        assert _fits(tiny, batch, length)
    assert not _fits(tiny, found.largest_batch + 1, 256)
    assert found.longest_sequence < 1024
    assert not _fits(tiny, 2, found.longest_sequence + 128)
    by_shape = {(cell.batch_size, cell.seq_len): cell for cell in found.grid}
    assert by_shape[1, 512].verdict == "fits"
    assert by_shape[16, 1024].verdict == "no"
    assert max(length for _, length in by_shape) == 1024


def _fits(model: Path, batch: int, length: int) -> bool:
    found = plan(model, batch_size=batch, seq_len=length, gpu_memory="560MiB", compare=False, grid=False)
    return found.verdict == "fits"


def test_advice_says_what_each_change_saves(tiny: Path):
    found = plan(
        tiny, batch_size=8, seq_len=512, gpu_memory="540MiB", gradient_checkpointing=False, compare=False, grid=False
    )
    assert found.verdict == "no"
    changes = {advice.change.split()[0]: advice for advice in found.advice}
    assert {"--gradient-checkpointing", "--batch-size", "--seq-len", "--activation-offloading"} <= changes.keys()
    assert "--embeddings" in changes
    for advice in found.advice:
        assert advice.total_bytes + advice.saved_bytes == found.usage.total_bytes
        assert advice.fits == (advice.total_bytes <= 540 * 2**20)
    assert found.advice == sorted(found.advice, key=lambda a: -a.saved_bytes)


def test_a_base_brings_its_rank(tmp_path: Path):
    base = make_base(tmp_path / "base", config=QosoraConfig(rank=4))
    found = plan(base, seq_len=32, grid=False, compare=False)
    assert found.rank == 4
    with pytest.raises(ConfigError, match="decomposed with rank 4, so rank 8"):
        plan(base, rank=8, seq_len=32)


# ---- errors ----


def test_errors_are_one_line_each(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def offline(name: str, **_: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection")

    monkeypatch.setattr("qosora.memory.shapes.AutoConfig.from_pretrained", offline)
    cases = {
        ("no-such-model",): "no built-in shape has that name",
        ("lama-2-7b",): "did you mean 'llama-2-7b'?",
        (str(tmp_path / "nowhere"),): "is no file or folder",
        (str(tmp_path), "--rank", "0"): "must be an integer of at least 1",
        ("llama-2-7b", "--seq-len", "8192"): "seq_len 8192 is longer than the model's 4096 positions",
        ("llama-2-7b", "--gpu-memory", "3GiB"): "the weights alone take 3.7",
        ("llama-2-7b", "--gpu-memory", "24"): "a number above zero with a unit, such as 24GiB",
        ("llama-2-7b", "--gpu", "Voodoo 2"): "gpu must be one of T4",
        ("llama-2-7b", "--device", "cpu", "--gpu-memory", "24GiB"): "leave them out, or plan for cuda",
        ("llama-2-7b", "--device", "cpu", "--activation-offloading"): "and there is no GPU",
        ("llama-2-7b", "--packing", "--padding"): "packing leaves nothing to pad",
    }
    for args, expected in cases.items():
        try:
            status = main(["plan", *args])
        except SystemExit as error:
            status = int(error.code or 0)
        message = capsys.readouterr().err
        assert status in (1, 2), args
        assert expected in message, message
        assert "Traceback" not in message
        assert message.startswith("usage:") or message.count("\n") == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        plan(empty)


def test_experts_counted_by_hand():
    c, rank = SHAPES["mixtral-8x7b"], 128
    hidden, wide, layers, experts = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], 8
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += experts * [(wide, hidden), (wide, hidden), (hidden, wide)]
    found = plan("mixtral-8x7b", batch_size=1, seq_len=512, grid=False, gpu="H100")
    assert found.usage.rows["base residual"] == pytest.approx(layers * sum(four_bits(m * n) for m, n in shapes), 1e-4)
    assert found.trained_parameters == layers * sum(m + rank for m, n in shapes)
    assert found.usage.rows["embeddings and head"] == 2 * 32000 * hidden * 2
    assert found.usage.rows["norms, biases, buffers"] >= layers * (experts + 2) * hidden * 2  # routers and norms
    assert found.qlora is None
    assert any("one gets every token" in text for text in found.assumptions)


@pytest.mark.filterwarnings("ignore:.*hold matrices in stacks")
def test_experts_that_stay_stacked_are_refused():
    config = MixtralConfig(num_hidden_layers=2, num_local_experts=4)
    with pytest.raises(QosoraError, match="its experts are stacked"):
        plan(config, seq_len=64, storage=QosoraConfig(modules_to_not_convert=["experts"]))


def test_a_model_without_sdpa_is_planned_with_what_it_has():
    sizes = {k: v for k, v in TINY.items() if k != "model_type"}
    assert plan(Gemma2Config(head_dim=16, **sizes), seq_len=64, grid=False, compare=False).usage.total_bytes > 0


# ---- the command ----


def test_command(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(tiny), "--seq-len", "512", "--gpu-memory", "640MiB"]) == 0
    text = capsys.readouterr().out
    for part in (
        "base residual",
        "QLoRA r=16",
        "fits into 0.625 GiB",
        "largest batch at 512 tokens",
        "assumed: kernels' shapes come from tracing",
    ):
        assert part in text


def test_command_prints_json(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(tiny), "--json", "--no-grid", "--no-qlora", "--batch-size", "2", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usage"]["total_bytes"] == sum(found["usage"]["rows"].values())
    assert (found["batch"]["size"], found["batch"]["padding"], found["qlora"]) == (2, True, None)
    assert "CUDA context" not in found["usage"]["rows"]


# ---- a base that is not on the GPU


def test_a_base_on_the_host_and_when_copying_is_free(tiny: Path):
    found = plan(tiny, batch_size=1, seq_len=256, gpu="RTX 4090", base_on="host", compare=True, grid=False)
    streaming = found.streaming
    assert streaming is not None
    rate = ATTAINED * TFLOPS["RTX 4090"]
    assert (streaming.link, streaming.tflops) == (LINK, rate)
    traced = TracedModel(model_config(tiny), QosoraConfig(), StepOptions(base_on="host"))
    assert streaming.host_bytes == traced.host_bytes
    seconds = traced.largest_layer / (LINK * 1e9)
    for_a_token = 2 * traced.layer_products / (rate * 1e12)
    assert streaming.free_from is not None
    assert (streaming.free_from - 1) * for_a_token < seconds <= streaming.free_from * for_a_token
    slower = plan(tiny, batch_size=1, seq_len=256, gpu="RTX 4090", base_on="host", grid=False, link=5, tflops=200)
    assert slower.streaming is not None
    assert slower.streaming.free_from is not None
    assert slower.streaming.free_from > 10 * streaming.free_from
    resident = plan(tiny, batch_size=1, seq_len=256, gpu="RTX 4090", grid=False)
    assert resident.streaming is None
    assert found.qlora == resident.qlora
    unknown = plan(tiny, batch_size=1, seq_len=256, gpu_memory="8GiB", base_on="host", grid=False).streaming
    assert unknown is not None
    assert unknown.free_from is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strategy": "fsdp"}, "say how many with gpus"),
        ({"base_on": "disk"}, "base_on must be one of gpu, host, got 'disk'"),
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"base_on": "host", "device": "cpu"}, "base_on and gpus are about GPUs, and device is cpu"),
        ({"link": 5.0}, "link and tflops are about a base in host memory"),
        ({"base_on": "host", "link": -1.0}, "link must be above 0"),
    ],
)
def test_what_cannot_be_planned_of_a_base_elsewhere(tiny: Path, options: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        plan(tiny, batch_size=1, seq_len=64, **options)


@pytest.mark.slow
def test_a_base_on_the_host_is_advised_where_it_helps():
    small = plan("llama-3.2-1b", batch_size=1, seq_len=256, gpu_memory="1600MiB", compare=False, grid=False)
    assert small.verdict != "fits"
    assert "--base-on host" in [advice.change for advice in small.advice]
    with pytest.raises(ConfigError, match="keep the base in host memory, with base_on host, or take a smaller model"):
        plan("llama-3-70b", batch_size=1, seq_len=512, gpu="RTX 4090", compare=False, grid=False)
