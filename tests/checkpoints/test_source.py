"""Checkpoints in every format against transformers' own loading of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from read_state import assert_equal, read
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from qosora.checkpoints.source import open_source
from qosora.errors import CheckpointError


def test_safetensors_win(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    with open_source(folder) as source:
        assert_equal(read(source.reader), load_file(folder / "model.safetensors"))
        assert source.files == (folder / "model.safetensors",)


# What is quantized already, or is not there.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}), "fp8"),
        (lambda f: (f / "quantize_config.json").write_text("{}"), "as quantize_config.json says"),
        (lambda f: (f / "quant_config.json").write_text("{}"), "as quant_config.json says"),
        (lambda f: add(f, "model.layers.0.mlp.up_proj.qweight"), "it holds model.layers.0.mlp.up_proj.qweight"),
        (lambda f: add(f, "model.layers.0.mlp.up_proj.weight.absmax"), r"it holds .*\.absmax"),
        (lambda f: add(f, "model.layers.0.mlp.up_proj.weight_scale_inv"), r"it holds .*\.weight_scale_inv"),
    ],
)
def test_what_is_quantized_already_is_refused(change: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    change(folder)
    with pytest.raises(CheckpointError, match=f"quantized already \\({reason}.*original 16-bit") as caught:
        open_source(folder).__enter__()
    assert str(folder) in str(caught.value)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights there"):
        open_source(folder).__enter__()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no model there that transformers can load"):
        open_source(folder).__enter__()
    (folder / "tiny.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name the file, as .*tiny\.gguf"):
        open_source(folder).__enter__()
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(folder / "other.gguf").__enter__()
