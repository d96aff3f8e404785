"""Exports onto the original model: merged and as LoRA, against W0 + ΔW computed in float64 from the files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import expected_logits, learned, refused, tensors_of
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import (
    Trained,
    load,
    logits,
    make_checkpoint,
    make_trained,
    perturbed,
    relative_difference,
)
from transformers import AutoModelForCausalLM

from qosora.checkpoints.folders import read_json, write_json
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.errors import CheckpointError, ConfigError
from qosora.export import export_lora, export_merged

# PEFT stacks experts' matrices and their ranks, then looks for the ranks among modules only.
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")


@pytest.mark.parametrize("family", ["llama-bias", "mistral", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe-sparse"])
def test_merged_and_lora_are_the_original_plus_what_was_learned(tmp_path: Path, family: str):
    trained = make_trained(tmp_path, family)
    report = export_merged(trained.base, tmp_path / "merged", trained.adapter, onto="original", max_shard_bytes=50_000)
    lora = export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert report.original == lora.original == str(trained.original)  # as the manifest says
    assert report.quantization_error is not None
    assert 0.03 < report.quantization_error < 0.1
    assert sorted(tensors_of(tmp_path / "merged")) == sorted(tensors_of(trained.original))
    expected = expected_logits(trained)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    plain = AutoModelForCausalLM.from_pretrained(trained.original).eval()
    assert relative_difference(logits(plain), expected) > 0.05
    with_lora = logits(PeftModel.from_pretrained(plain, tmp_path / "lora").eval())
    assert relative_difference(merged, expected) < 1e-5
    assert relative_difference(with_lora, expected) < 1e-5
    assert relative_difference(logits(trained.model), expected) > 1e-3  # the quantization error


def test_a_trained_weight_is_the_originals_plus_delta(tiny: Trained, tmp_path: Path):
    export_merged(tiny.base, tmp_path / "export", tiny.adapter, onto="original")
    got, original, delta = tensors_of(tmp_path / "export"), tensors_of(tiny.original), learned(tiny)
    for name, weight in original.items():
        expected = weight.double() + delta.get(name.removesuffix(".weight"), 0.0)
        assert (got[name] - expected).abs().max() < 2e-7 * max(1.0, float(expected.abs().max())) * 4, name


def test_without_an_adapter_it_is_the_original(tiny: Trained, tmp_path: Path):
    export_merged(tiny.base, tmp_path / "export", onto="original")
    got, original = tensors_of(tmp_path / "export"), tensors_of(tiny.original)
    assert got.keys() == original.keys()
    assert all(torch.equal(got[name], original[name]) for name in original)


@pytest.mark.parametrize("export", [export_merged, export_lora])
def test_another_original(tiny: Trained, tmp_path: Path, export: Any):
    onto: dict[str, Any] = {"export": export} | ({"onto": "original"} if export is export_merged else {})
    args = (tiny.base, tiny.adapter)
    make_checkpoint(tmp_path / "same", "llama-tied", seed=1)
    tensors = tensors_of(tiny.original)
    cut = {**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(54, 32)}
    shutil.copytree(tiny.original, tmp_path / "wide")
    save_file(cut, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    shapes = r"up_proj.weight has shape \(54, 32\), but .* one with \(56, 32\)"
    refused(tmp_path, shapes, *args, original=tmp_path / "wide", **onto)
    refused(tmp_path, r"down_proj.weight is 1.\d+ of its norm away", *args, original=tmp_path / "same", **onto)
    # A fine-tuned version of the original: nearer than 4 bits can tell, but the base remembers its own error.
    tuned = {name: t + 0.02 * t.std() * torch.randn(t.shape) for name, t in tensors.items()}
    save_file(tuned, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"where quantization alone makes 0.0\d+; another", *args, original=tmp_path / "wide", **onto)
    del cut["model.layers.1.mlp.up_proj.weight"]
    save_file(cut, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "no model.layers.1.mlp.up_proj.weight there", *args, original=tmp_path / "wide", **onto)


def test_the_original_is_not_overwritten(tiny: Trained):
    for export in (export_lora, lambda *args, **options: export_merged(*args, onto="original", **options)):
        with pytest.raises(CheckpointError, match="which is being read"):
            export(tiny.base, tiny.original, tiny.adapter, overwrite=True)


def test_the_original_is_asked_for_where_it_is_not_known(tiny: Trained, tmp_path: Path):
    shutil.copytree(tiny.base, tmp_path / "base")
    manifest = read_json(tmp_path / "base" / MANIFEST_NAME)
    write_json(tmp_path / "base" / MANIFEST_NAME, {**manifest, "source": "org/model"})
    base = tmp_path / "base"
    refused(tmp_path, "made of org/model, which is not there; .* --original", base, onto="original", error=ConfigError)
    lora = export_lora(base, tmp_path / "lora", tiny.adapter)  # needs but its name
    assert LoraConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == lora.original == "org/model"
    (base / MANIFEST_NAME).unlink()
    refused(tmp_path, "no manifest that tells; .* --original", base, onto="original", error=ConfigError)
    refused(tmp_path, "say --original", base, tiny.adapter, export=export_lora, error=ConfigError)
    with pytest.raises(ConfigError, match=r"onto='original'"):
        export_merged(base, tmp_path / "export", original=tiny.original)
    report = export_merged(base, tmp_path / "export", tiny.adapter, onto="original", original=tiny.original)
    assert report.quantization_error is not None


def test_a_base_with_an_adapter_merged_into_it_has_no_original(tiny: Trained, tmp_path: Path):
    merged = perturbed(load(tiny.base), vectors="s").merge_and_unload()
    merged.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"original": tiny.original}
    refused(tmp_path, "an adapter was merged into this base", tmp_path / "base", onto="original", **options)
    model = perturbed(load(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    refused(tmp_path, "an adapter was merged", tmp_path / "base", adapter, export=export_lora, **options)
    export_merged(tmp_path / "base", tmp_path / "export", adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert relative_difference(logits(plain), logits(model)) < 1e-5


def test_pickled_original_in_another_dtype(tmp_path: Path):
    trained = make_trained(tmp_path, "llama-bias", dtype=torch.bfloat16)
    tensors = tensors_of(trained.original)
    (trained.original / "model.safetensors").unlink()
    torch.save(tensors, trained.original / "pytorch_model.bin")
    report = export_merged(trained.base, tmp_path / "export", trained.adapter, onto="original", dtype="float32")
    assert report.dtype == "float32"
    got, delta = tensors_of(tmp_path / "export"), learned(trained)
    name = "model.layers.0.mlp.gate_proj.weight"
    expected = tensors[name].double() + delta[name.removesuffix(".weight")]
    assert (got[name] - expected).abs().max() < 1e-6
    assert {t.dtype for t in got.values()} == {torch.float32}


KILLED = """
import sys
from qosora.export import export_lora, export_merged

def stop(state):
    if state.done == state.total // 2:
        print("half", flush=True)
        sys.stdin.readline()

base, output, adapter, kind = sys.argv[1:]
if kind == "lora":
    export_lora(base, output, adapter, progress=stop)
else:
    export_merged(base, output, adapter, onto=kind, max_shard_bytes=20_000, progress=stop)
"""


@pytest.mark.parametrize("kind", ["original", "lora"])
@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tiny: Trained, tmp_path: Path, kind: str):
    output = tmp_path / "export"
    command = [sys.executable, "-c", KILLED, str(tiny.base), str(output), str(tiny.adapter), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    left = list(output.with_name("export.partial").rglob("*.safetensors"))
    assert left
    for file in left:
        with pytest.raises(Exception, match="header"):
            load_file(file)
    states: list[Any] = []
    export: Any = export_lora if kind == "lora" else export_merged
    options: dict[str, Any] = {} if kind == "lora" else {"onto": kind, "max_shard_bytes": 20_000}
    export(tiny.base, output, tiny.adapter, progress=states.append, **options)
    assert states[0].done >= states[0].total // 2
    export(tiny.base, tmp_path / "undisturbed", tiny.adapter, **options)
    for file in (tmp_path / "undisturbed").glob("*.safetensors"):
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"export", "undisturbed"}
