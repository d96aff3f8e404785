"""The file format: its tensors against the gguf package's, in little memory, and damaged files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from read_state import assert_equal, read
from tiny_gguf import random_model, write_gguf
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from qosora.checkpoints.source import open_source
from qosora.errors import CheckpointError


def loaded_by_transformers(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model


KINDS = {"attn_q": Kind.Q8_0, "attn_k": Kind.Q5_0, "ffn_down": Kind.Q4_K, "ffn_up": Kind.F16, "ffn_gate": Kind.BF16}


@pytest.mark.parametrize("chunk", [1 << 20, 300])
def test_quantized_gguf(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qosora.checkpoints.gguf_file._CHUNK_NUMEL", chunk)
    model = random_model("llama")
    file = write_gguf(tmp_path / "tiny.gguf", "llama", model, KINDS)
    with open_source(file) as source:
        got = read(source.reader)
    assert_equal(got, loaded_by_transformers(file).state_dict())
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(got[up], model.get_parameter(up).half().float())


def test_a_gguf_tensor_costs_its_float32_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qosora.checkpoints.gguf_file._CHUNK_NUMEL", 1024)
    model = random_model("llama", intermediate_size=8192)
    file = write_gguf(tmp_path / "tiny.gguf", "llama", model, {"ffn": Kind.Q8_0})
    with open_source(file) as source:
        source.reader.tensor("model.layers.0.mlp.up_proj.weight")
        tracemalloc.start()
        for name in source.reader.names():
            source.reader.tensor(name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1.2 * 8192 * 32 * 4


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 1000, 4000, -1000, -1])
def test_a_truncated_gguf_file_is_refused(keep: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny.gguf: .* get another copy"):
        open_source(file).__enter__()


@pytest.mark.parametrize("header", [b"GGML" + bytes(20), b"GGUF\x00\x00\x00\x03" + bytes(20), b"GGUF\x04" + bytes(23)])
def test_other_files_are_not_taken_for_gguf(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(header)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        open_source(tmp_path / "tiny.gguf").__enter__()
