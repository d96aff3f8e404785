"""How far a base is from its original: against both models in memory, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, load, make_checkpoint, sums, write_jsonl
from transformers import AutoModelForCausalLM

from qosora.base import divergence, quantize
from qosora.cli import main
from qosora.config import QosoraConfig
from qosora.errors import ConfigError

TOKENS = [[(7 * i + 3 * j * j) % VOCAB for j in range(31)] for i in range(3)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_against_both_in_memory(family: str, tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", family)
    quantize(source, tmp_path / "base", QosoraConfig(rank=4))
    found = divergence(source, tmp_path / "base", TOKENS, device="cpu")
    ids = torch.tensor([token for row in TOKENS for token in row])[None]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        p, q = (
            model(ids).logits[0, :-1].double().log_softmax(-1) for model in (original, load(tmp_path / "base").eval())
        )
    following = ids[0, 1:, None]
    assert found.tokens == ids.numel() - 1
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2, abs=1e-6)
    assert found.kl > 0
    assert found.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.03)
    assert found.original_loss == pytest.approx(-float(p.gather(1, following).mean()), rel=1e-3)
    assert found.base_loss == pytest.approx(-float(q.gather(1, following).mean()), rel=1e-3)


def test_a_better_base_is_nearer(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "llama")
    found = []
    for rank in (2, 30):
        quantize(source, tmp_path / f"base{rank}", QosoraConfig(rank=rank))
        found.append(divergence(source, tmp_path / f"base{rank}", TOKENS, device="cpu").kl)
    assert found[1] < found[0]


def test_no_text(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "llama")
    quantize(source, tmp_path / "base", QosoraConfig(rank=4))
    with pytest.raises(ConfigError, match="there is no token in the texts"):
        divergence(source, tmp_path / "base", [], device="cpu")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = make_checkpoint(tmp_path / "source", "llama-text")
    data = write_jsonl(tmp_path / "data.jsonl", sums(20))
    argv = ["quantize", str(source), str(tmp_path / "base"), "--rank", "8", "--check", str(data)]
    assert main(argv) == 0
    assert "KL divergence 0." in capsys.readouterr().out
    assert main([*argv, "--overwrite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["check"]
    assert set(said) == {"tokens", "kl", "same_top", "original_loss", "base_loss"}
    assert said["tokens"] > 100
