"""A base with a scale, from the original to its exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import Trained, decompose, load, logits, make_checkpoint, perturbed, relative_difference
from transformers import AutoModelForCausalLM

from qosora import QosoraConfig
from qosora.adapter import model_fingerprint
from qosora.base.convert import quantize
from qosora.base.describe import describe
from qosora.checkpoints.fingerprint import stored_fingerprint
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.checkpoints.reader import CheckpointReader
from qosora.errors import CheckpointError
from qosora.export import ExportReport, LoraReport, export_lora, export_merged
from qosora.layers.linear import qosora_modules

FAMILIES = ("llama", "gemma3", "gpt2", "qwen3_moe")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT stacks experts' matrices and their ranks, then looks for the ranks among modules only.
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]


def make_uneven(folder: Path, family: str) -> Path:
    """Write an ordinary checkpoint whose layers meet inputs with weights of very different sizes."""
    config: dict[str, Any] = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
    make_checkpoint(folder, family, **config)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and (".layers." in name or ".h." in name):
            transposed = family == "gpt2"
            sizes = torch.exp2(1.5 * torch.randn(tensor.shape[0 if transposed else 1], generator=generator) - 1)
            tensor *= sizes[:, None] if transposed else sizes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_trained(folder: Path, family: str) -> Trained:
    original = make_uneven(folder / "original", family)
    quantize(original, folder / "base", QosoraConfig(rank=8, scale="columns"))
    model = perturbed(load(folder / "base"))
    model.save_pretrained(folder / "adapter")
    return Trained(original, folder / "base", folder / "adapter", model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("scaled")
    return {family: make_trained(folder / family, family) for family in FAMILIES}


@pytest.fixture
def copy(trained: dict[str, Trained], tmp_path: Path) -> Path:
    """A base, to be damaged."""
    return Path(shutil.copytree(trained["llama"].base, tmp_path / "base"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.tensor(name).clone() for name in reader.names()}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_what_from_pretrained_makes(trained: dict[str, Trained], family: str, tmp_path: Path):
    decompose(trained[family].original, QosoraConfig(rank=8, scale="columns")).save_pretrained(tmp_path)
    loaded, streamed = tensors_of(tmp_path), tensors_of(trained[family].base)
    assert loaded.keys() == streamed.keys()
    assert [name for name, tensor in loaded.items() if not torch.equal(tensor, streamed[name])] == []
    scales = [tensor for name, tensor in streamed.items() if name.endswith(".c")]
    assert len(scales) == len(qosora_modules(trained[family].model))
    assert all(c.dtype == torch.float32 and len(c.unique()) > 3 for c in scales)
    configs = [json.loads((f / "config.json").read_text()) for f in (tmp_path, trained[family].base)]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["scale"] == "columns"


@pytest.mark.parametrize("family", FAMILIES)
def test_reports_are_of_the_whole_weight(trained: dict[str, Trained], family: str):
    layers = json.loads((trained[family].base / "qosora_manifest.json").read_text())["layers"]
    found = {name.removeprefix("base_model.model."): m for name, m in qosora_modules(trained[family].model).items()}
    weights = load_file(trained[family].original / "model.safetensors")
    for report in layers:
        module = found[f"{report['name']}.base_layer"]
        if f"{report['name']}.weight" not in weights:
            continue
        weight = weights[f"{report['name']}.weight"]
        weight = weight.T if module.fan_in_fan_out else weight
        lost = torch.linalg.vector_norm(weight - module.dequantize()) / torch.linalg.vector_norm(weight)
        assert report["error"] == pytest.approx(float(lost), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged(trained: dict[str, Trained], family: str, tmp_path: Path):
    base, adapter, model = trained[family][1:]
    export_merged(base, tmp_path / "export", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert relative_difference(logits(load(base)), logits(model)) > 0.01
    assert relative_difference(logits(merged), logits(model)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_onto_the_original_and_as_lora(trained: dict[str, Trained], family: str, tmp_path: Path):
    original, base, adapter, model = trained[family]
    export_merged(base, tmp_path / "merged", adapter, onto="original")
    export_lora(base, tmp_path / "lora", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = AutoModelForCausalLM.from_pretrained(original).eval()
    if family != "qwen3_moe":  # whose experts are stacked here
        with torch.no_grad():
            for name, layer in model.base_model.model.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    target = plain.get_submodule(name)
                    delta = layer.get_delta_weight("default")
                    expected = target.weight + (delta.T if layer.base_layer.fan_in_fan_out else delta)
                    got = merged.get_submodule(name).weight
                    assert relative_difference(got, expected) < 1e-5, name
    before = logits(plain)
    with_lora = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    assert relative_difference(before, logits(merged)) > 0.01
    assert relative_difference(logits(with_lora), logits(merged)) < 1e-5


@pytest.mark.slow
def test_verified_exports(trained: dict[str, Trained], tmp_path: Path):
    base, adapter = trained["llama"].base, trained["llama"].adapter
    found: list[ExportReport | LoraReport] = [
        export_merged(base, tmp_path / "a", adapter, verify=True),
        export_merged(base, tmp_path / "b", adapter, onto="original", verify=True),
        export_lora(base, tmp_path / "c", adapter, verify=True),
        export_lora(base, tmp_path / "d", adapter, rank=3, verify=True),
    ]
    for report in found:
        verified = report.verification
        assert verified is not None
        assert verified.relative_difference <= verified.tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized(trained: dict[str, Trained], family: str):
    model = load(trained[family].base)
    expected = logits(model)
    assert relative_difference(logits(model.dequantize()), expected) < 1e-5


def test_merging_into_the_base(trained: dict[str, Trained]):
    model = PeftModel.from_pretrained(load(trained["llama"].base), trained["llama"].adapter).eval()
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_the_fingerprint_covers_it(copy: Path):
    with CheckpointReader(copy) as reader:
        before = stored_fingerprint(reader)
    assert model_fingerprint(load(copy)) == before == describe(copy)["fingerprint"]
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.c"][-1] *= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(load(copy)) != before


def test_described(trained: dict[str, Trained]):
    found = describe(trained["llama"].base)
    assert found["quantization"]["scale"] == "columns"
    stored = sum(t.nbytes for t in tensors_of(trained["llama"].base).values())
    assert found["total_bytes"] == stored


def test_a_base_without_what_its_config_promises_is_refused(copy: Path, tmp_path: Path):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.c"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.c"):
        load(copy)
    with pytest.raises(CheckpointError, match=r"down_proj\.c must have shape \(\d+,\), got nothing"):
        export_merged(copy, tmp_path / "export")
