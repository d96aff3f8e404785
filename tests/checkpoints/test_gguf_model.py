"""Models in GGUF files against transformers' own loading of them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from read_state import State, assert_equal, read
from tiny import VOCAB
from tiny_gguf import MODELS, random_model, write_gguf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from qosora.checkpoints.source import open_source
from qosora.errors import CheckpointError


def loaded_by_transformers(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model


def as_on_disk(model: PreTrainedModel, state: State) -> State:
    """The tensors that an ordinary checkpoint has, by their names there."""
    kept = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    converted: State = revert_weight_conversion(model, kept)
    return converted


@pytest.mark.parametrize("name", MODELS)
def test_gguf(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    file = write_gguf(tmp_path / "tiny.gguf", name, model)
    with open_source(file) as source:
        got = read(source.reader)
        config = json.loads((source.origin / "config.json").read_text())
        assert source.files == (file,)
    assert not source.origin.exists()
    reference = loaded_by_transformers(file)
    assert_equal(got, as_on_disk(model, reference.state_dict()))
    exactly = not name.startswith("gemma3")  # 1 was added to its norms, and they were rounded
    for key, tensor in as_on_disk(model, model.state_dict()).items():
        assert torch.allclose(got[key], tensor, rtol=0, atol=0 if exactly else 1e-7), key

    expected = json.loads(reference.config.to_json_string())
    assert config["dtype"] == "bfloat16"
    apart = {"dtype", "architectures", "quantization_config"}
    assert {k: v for k, v in config.items() if k not in apart} == {k: v for k, v in expected.items() if k not in apart}


def test_the_tokenizer_is_that_of_the_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"))
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    (tmp_path / "tokenizer.json").write_text("another model's")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "another"}')
    with open_source(file) as source:
        tokenizer = AutoTokenizer.from_pretrained(source.origin)
        texts = [path.read_text() for path in source.origin.iterdir()]
    assert tokenizer("!!!ABC</s>")["input_ids"] == expected("!!!ABC</s>")["input_ids"]
    assert tokenizer.chat_template == expected.chat_template == "{{ messages }}"
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 1)
    assert not any(tempfile.gettempdir() in text for text in texts)


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", random_model("llama"), tokenizer=False)
    with open_source(file) as source:
        assert {path.name for path in source.origin.iterdir()} == {"config.json", "generation_config.json"}
        assert AutoConfig.from_pretrained(source.origin).vocab_size == VOCAB


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, architecture: str = "llama", **options: Any) -> None:
        file = write_gguf(tmp_path / "tiny.gguf", architecture, random_model("llama"), **options)
        with pytest.raises(CheckpointError, match=message):
            open_source(file).__enter__()

    refused("one of 3 parts .* llama-gguf-split --merge tiny.gguf", extra=lambda w: w.add_uint16("split.count", 3))
    integers = np.ones((2, 32), np.int8)
    refused("cannot read blk.0.other", extra=lambda w: w.add_tensor("blk.0.other", integers, raw_dtype=Kind.I8))
    experts = np.ones((4, 56, 32), np.float32)  # as of Mixtral, which llama.cpp calls llama, too
    refused(
        "blk.0.ffn_up_exps.weight stacks 4 experts", extra=lambda w: w.add_tensor("blk.0.ffn_up_exps.weight", experts)
    )
    refused("cannot read this 'mpt' model", architecture="mpt")
    refused(
        r"attn_k.weight has shape \(16, 32\), but .* \(32, 32\)",
        extra=lambda w: w.add_head_count_kv(4),
        head_counts=False,
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"needs the gguf package; pip install 'qosora\[gguf\]'")
