"""The models that can be planned for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_config

from qosora.errors import CheckpointError
from qosora.memory.shapes import SHAPES, model_config


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_configs(name: str):
    config = model_config(name)
    assert config.hidden_size == SHAPES[name]["hidden_size"]
    assert config.tie_word_embeddings == SHAPES[name].get("tie_word_embeddings", "gemma" in name)


def test_a_name_in_any_case_is_a_shape_of_its_own():
    config = model_config("Llama-2-7B")
    config.hidden_size = 1
    assert model_config("llama-2-7b").hidden_size == 4096


def test_folders_and_files(tmp_path: Path):
    tiny_config("gemma3").save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        found = model_config(place)
        assert (found.model_type, found.hidden_size, found.sliding_window) == ("gemma3_text", 32, 16)


def test_what_is_no_model_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, **_: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection")

    with pytest.raises(CheckpointError, match=r"has no config\.json; give the folder of a model, or one of llama-2-7b"):
        model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match=r"no config\.json that transformers knows \(.*unheard-of"):
        model_config(tmp_path)
    monkeypatch.setattr("qosora.memory.shapes.AutoConfig.from_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"connect to the hub\).*did you mean 'llama-2-7b'\?") as caught:
        model_config("lama-2-7b")
    assert "\n" not in str(caught.value)
