"""A base in host memory trains to the bit what a resident one does; in several processes, see test_processes."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import TEXT_VOCAB, make_base, make_model, make_tokenizer
from torch import nn
from torch.distributed.tensor import DTensor
from training_runs import config, metrics

from qosora.base.load import load_base
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import ConfigError
from qosora.layers.decoder import decoder_layers
from qosora.training.run import train
from qosora.training.sharding import group_of_one, is_sharded, shard
from qosora.training.trl_options import choose_strategy

#: Options of a run, and of the base that it trains on.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "checkpointed": ({}, {}),
    "kept": ({"gradient_checkpointing": False, "gradient_accumulation": 2, "batch_size": 2}, {}),
    "tied": ({"update_rank": 2}, {"family": "gemma3-text"}),
    "mixture": ({"tile_length": 16}, {"family": "qwen3_moe", "vocab_size": TEXT_VOCAB}),
    "vocabulary": ({"vectors": "s"}, {"family": "gemma3-text", "embeddings": "4bit", "hidden_size": 64}),
    "vocabulary in 8 bits": ({}, {"family": "llama-text", "embeddings": "8bit", "hidden_size": 64}),
    "saved": ({"modules_to_save": ["lm_head"]}, {}),
    "compiled": ({"compile": True}, {}),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", RUNS)
def test_a_base_in_host_memory_trains_as_a_resident_one(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    options, base = dict(RUNS[name][0]), dict(RUNS[name][1])
    if base:
        family, embeddings = base.pop("family"), base.pop("embeddings", None)
        made = QosoraConfig(rank=8, embeddings=embeddings) if embeddings else QosoraConfig(rank=8)
        options["model"] = str(make_base(tmp_path / "base", family, made, **base))
        make_tokenizer().save_pretrained(tmp_path / "base")
    options = {"max_steps": 6, "eval_data": str(place / "test.jsonl"), "eval_steps": 2, "max_length": 48} | options
    resident = train(config(place, tmp_path / "resident", **options))
    hosted = train(config(place, tmp_path / "hosted", **options, base_on="host"))
    assert not torch.distributed.is_initialized()
    expected = load_file(tmp_path / "resident" / "adapter_model.safetensors")
    got = load_file(tmp_path / "hosted" / "adapter_model.safetensors")
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key
    for mine, theirs in zip(metrics(tmp_path / "hosted"), metrics(tmp_path / "resident"), strict=True):
        assert mine.get("loss") == theirs.get("loss")
        assert mine.get("eval_loss", 0) == pytest.approx(theirs.get("eval_loss", 0), rel=1e-5)
    assert hosted.eval_loss_after == pytest.approx(resident.eval_loss_after, rel=1e-5)


def test_what_is_divided_and_what_is_whole(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    model = get_peft_model(load_base(tmp_path / "base"), OsoraConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with group_of_one(torch.device("cpu")):
        shard(model, torch.device("cpu"), on_host=True)
        assert is_sharded(model)
        assert all(is_sharded(layer) for layer in decoder_layers(model.get_base_model())[1])
        for name, p in model.named_parameters():
            whole = p.requires_grad or p.ndim == 0
            assert isinstance(p, DTensor) is not whole, name
            assert torch.equal(p if whole else p.full_tensor(), before[name]), name
    assert not is_sharded(make_model())


def test_accelerates_configuration_is_followed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = config(place, tmp_path / "run")
    assert choose_strategy(plain) == ("ddp", False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"configured for FSDP1, .*use FSDP2: strategy fsdp"):
        choose_strategy(plain)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert choose_strategy(plain) == ("fsdp", True)
    assert choose_strategy(plain) == ("ddp", False)  # accelerate is told of nothing but processes from here on
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed does not divide tensors of 4 bits; use FSDP2"):
        choose_strategy(plain)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    for name in ("deepspeed", "fsdp", "fsdp_config"):
        with pytest.raises(ConfigError, match="use FSDP2: strategy fsdp"):
            choose_strategy(config(place, tmp_path / "run", trl={name: "x"}))
