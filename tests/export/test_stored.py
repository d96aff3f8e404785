"""A base as it is read from files, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import edit_tensors, refused
from peft import PeftModel
from tiny import (
    Trained,
    decompose,
    load,
    logits,
    make_checkpoint,
    perturbed,
    relative_difference,
)
from transformers import AutoModelForCausalLM

from qosora.checkpoints.folders import read_json, write_json
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.errors import CheckpointError
from qosora.export import export_merged


def test_the_fingerprint_of_the_files_is_that_of_the_loaded_model(tiny: Trained, tmp_path: Path):
    report = export_merged(tiny.base, tmp_path / "export", tiny.adapter)
    assert report.fingerprint == read_json(tiny.adapter / "adapter_config.json")["base_fingerprint"]


def test_not_a_base(tiny: Trained, tmp_path: Path):
    refused(tmp_path, "an ordinary checkpoint, not a qosora base", tiny.original)
    refused(tmp_path, "is an adapter", tiny.adapter)
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "config.json: no such file", tmp_path / "empty")
    refused(tmp_path, "no such folder", tmp_path / "nowhere")
    refused(tmp_path, "neither a local folder nor", "a/b/c")
    refused(tmp_path, "is a file", tiny.base / "config.json")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors .* missing, among them 'model.norm.weight'"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.V"), "layers.0.mlp.up_proj.V is missing"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.U_absmax"), "up_proj.U_absmax .* got nothing"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_absmax_scale"), "up_proj.weight_absmax_scale .* nothing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), r"norm.weight has shape \(5,\)"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.o": torch.ones(57)}), r"up_proj\.\w+ must have shape"),
    ],
)
def test_a_damaged_base(copies: Trained, tmp_path: Path, edit: Any, match: str):
    edit_tensors(copies.base / "model.safetensors", edit)
    refused(tmp_path, r"model.safetensors has .*; get another copy", copies.base)
    (copies.base / MANIFEST_NAME).unlink()  # as of a base that save_pretrained wrote
    refused(tmp_path, match, copies.base)


def test_a_base_with_the_wrong_config(copies: Trained, tmp_path: Path):
    config = read_json(copies.base / "config.json")
    write_json(copies.base / "config.json", {**config, "intermediate_size": 80})
    refused(tmp_path, r"down_proj has shape \(32, 56\), but config.json makes it \(32, 80\)", copies.base)
    storage = {**config["quantization_config"], "blocksize": 128}
    write_json(copies.base / "config.json", {**config, "quantization_config": storage})
    refused(tmp_path, "absmax must have shape", copies.base)
    write_json(copies.base / "config.json", {**config, "model_type": "unheard-of"})
    with pytest.raises(CheckpointError, match="unheard-of"):
        export_merged(copies.base, tmp_path / "export")


def test_an_adapter_exports_as_it_loads(tmp_path: Path):
    """On-the-fly quantization, the saved base, and the files all carry the same fingerprint."""
    original = make_checkpoint(tmp_path / "original", "qwen3")
    model = decompose(original)
    model.save_pretrained(tmp_path / "base")
    adapted = perturbed(model, target_modules=["q_proj", "down_proj"])
    adapted.save_pretrained(tmp_path / "adapter")
    report = export_merged(tmp_path / "base", tmp_path / "export", tmp_path / "adapter")
    assert (report.merged_layers, report.adapted_layers) == (14, 4)
    reloaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert relative_difference(logits(plain), logits(reloaded)) < 1e-5
