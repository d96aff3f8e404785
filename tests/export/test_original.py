"""Exports onto the original model: merged and as LoRA, against W0 + ΔW computed in float64 from the files."""

from __future__ import annotations

import math
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

from qosora import QosoraConfig
from qosora.base.convert import quantize
from qosora.checkpoints.folders import read_json, write_json
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.checkpoints.reader import CheckpointReader
from qosora.decompose import nf4
from qosora.errors import CheckpointError, ConfigError, FingerprintError
from qosora.export import export_lora, export_merged
from qosora.export.lora import reduced
from qosora.layers.linear import qosora_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT stacks experts' matrices and their ranks, then looks for the ranks among modules only.
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("tiny"), "llama-tied")


def tensors_of(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    with CheckpointReader(folder, stem) as reader:
        return {name: reader.tensor(name).clone() for name in reader.names()}


def learned(trained: Trained) -> dict[str, torch.Tensor]:
    """Return ΔW of each layer by its module name, float64, with loops over the live model's 4-bit factors."""
    found = {}
    for name, layer in qosora_modules(trained.model.get_base_model()).items():
        adapter = trained.model.get_base_model().get_submodule(name.removesuffix(".base_layer"))
        s, o = (v.detach().double() for v in adapter.vectors("default"))
        U, V = (nf4.dequantize(getattr(layer.factors, part)).double() for part in ("U", "V"))
        sigma = layer.s.double()
        parts = (torch.outer(o * U[k] * s[k] - U[k] * sigma[k], V[k]) for k in range(len(sigma)))
        found[name.removesuffix(".base_layer")] = sum(parts)
    return found


@torch.no_grad()
def expected_logits(trained: Trained) -> torch.Tensor:
    """Return the logits of the original with ΔW added in float64; experts have no products in float64."""
    model = AutoModelForCausalLM.from_pretrained(trained.original, dtype=torch.float64).eval()
    for name, delta in learned(trained).items():
        block, _, expert = name.partition(".experts.")
        if not expert:
            weight = model.get_parameter(f"{name}.weight")
            weight += delta.T if type(model.get_submodule(name)).__name__ == "Conv1D" else delta
            continue
        index, projection = expert.split(".")
        stack = model.get_parameter(
            f"{block}.experts.{'down' if projection in ('w2', 'down_proj') else 'gate_up'}_proj"
        )
        start = len(delta) if projection in ("w3", "up_proj") else 0
        stack[int(index), start : start + len(delta)] += delta
    return logits(model.float())


@pytest.mark.parametrize("family", ["llama-bias", "mistral", "qwen3", "gemma3", "gpt2", "mixtral", "qwen3_moe-sparse"])
def test_merged_and_lora_are_the_original_plus_what_was_learned(tmp_path: Path, family: str):
    trained = make_trained(tmp_path, family)
    report = export_merged(trained.base, tmp_path / "merged", trained.adapter, onto="original", max_shard_bytes=50_000)
    lora = export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert report.original == lora.original == str(trained.original)  # as the manifest says
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


def test_lora_config(tmp_path: Path):
    trained = make_trained(tmp_path, "llama-bias", target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter, dtype="float16")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.lora_alpha == config.r == report.rank == 8
    assert config.target_modules == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert (config.base_model_name_or_path, config.fan_in_fan_out) == (str(trained.original), False)
    tensors = tensors_of(tmp_path / "lora", "adapter_model")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    assert (tensors[f"{key}A.weight"].shape, tensors[f"{key}B.weight"].shape) == ((8, 56), (32, 8))
    assert len(tensors) == 4
    assert "base_model: original" in (tmp_path / "lora" / "README.md").read_text()


def test_ranks_that_differ_keep_the_scaling(tmp_path: Path):
    original = make_checkpoint(tmp_path / "original", "gpt2")
    quantize(original, tmp_path / "base", QosoraConfig(rank=8, rank_pattern={"c_attn": 5, "h.0.mlp.c_fc": 3}))
    model = perturbed(load(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "adapter")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.fan_in_fan_out
    assert config.alpha_pattern == config.rank_pattern
    assert {"c_attn": 5, "transformer.h.0.mlp.c_fc": 3}.items() <= config.rank_pattern.items()
    plain = AutoModelForCausalLM.from_pretrained(original)
    got = logits(PeftModel.from_pretrained(plain, tmp_path / "lora").eval())
    trained = Trained(original, tmp_path / "base", tmp_path / "adapter", model)
    assert relative_difference(got, expected_logits(trained)) < 1e-5


def test_modules_trained_in_full_are_in_both(tmp_path: Path):
    trained = make_trained(tmp_path, "llama-bias", modules_to_save=["lm_head", "norm"])
    export_merged(trained.base, tmp_path / "merged", trained.adapter, onto="original")
    report = export_lora(trained.base, tmp_path / "lora", trained.adapter)
    assert {"lm_head.weight", "model.norm.weight"} < set(report.replaced)
    assert set(LoraConfig.from_pretrained(tmp_path / "lora").modules_to_save) == {"lm_head", "norm"}
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    plain = AutoModelForCausalLM.from_pretrained(trained.original)
    assert not torch.equal(tensors_of(tmp_path / "merged")["lm_head.weight"], plain.lm_head.weight)
    assert relative_difference(logits(PeftModel.from_pretrained(plain, tmp_path / "lora").eval()), merged) < 1e-5


def test_reduced_rank_is_the_best_one(tiny: Trained, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(40, 8, generator=generator), torch.randn(8, 30, generator=generator)
    small_B, small_A, S = reduced(B, A, 3)
    U, singular, Vh = torch.linalg.svd(B.double() @ A.double())
    torch.testing.assert_close(S, singular[:8])
    torch.testing.assert_close(small_B @ small_A, U[:, :3] * singular[:3] @ Vh[:3])

    report = export_lora(tiny.base, tmp_path / "lora", tiny.adapter, rank=3)
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.r == config.lora_alpha == report.rank == 3
    tensors = tensors_of(tmp_path / "lora", "adapter_model")
    deltas, lost = learned(tiny), 0.0
    for name, delta in deltas.items():
        key = f"base_model.model.{name}.lora_"
        made = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        singular = torch.linalg.svdvals(delta)
        assert math.isclose(float(torch.linalg.norm(delta - made)), float(singular[3:].norm()), rel_tol=1e-4)
        lost += float(singular[3:].square().sum())
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    assert math.isclose(report.rank_error, math.sqrt(lost / whole), rel_tol=1e-5)
    assert export_lora(tiny.base, tmp_path / "whole", tiny.adapter, rank=100).rank_error == 0.0


def test_a_linear_combination(tiny: Trained, tmp_path: Path):
    other = perturbed(load(tiny.base), seed=5, vectors="s")
    other.save_pretrained(tmp_path / "other")
    weights = {tiny.adapter: 0.7, tmp_path / "other": -0.3}
    report = export_merged(tiny.base, tmp_path / "merged", weights)
    assert report.adapters == {str(folder): weight for folder, weight in weights.items()}
    model = load(tiny.base)
    states = [load_file(folder / "adapter_model.safetensors") for folder in weights]
    for name, layer in qosora_modules(model).items():
        for kind, base in (("s", layer.s), ("o", layer.o)):
            key = f"base_model.model.{name}.osora_{kind}"
            changes = [
                w * (state[key] - base) for state, w in zip(states, weights.values(), strict=True) if key in state
            ]
            base.data = base + sum(changes)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    assert relative_difference(merged, logits(model)) < 1e-5
    alone = logits(tiny.model)
    assert relative_difference(merged, alone) > 0.02

    lora = export_lora(tiny.base, tmp_path / "lora", weights, original=tiny.original)
    assert lora.adapted_layers == 14


def test_combinations_that_make_no_sense(tiny: Trained, tmp_path: Path):
    full = perturbed(load(tiny.base), modules_to_save=["norm"])
    full.save_pretrained(tmp_path / "full")
    refused(tmp_path, r"brings model\..*norm.weight, trained in full", tiny.base, {tmp_path / "full": 0.5})
    refused(tmp_path, "a finite number, got nan", tiny.base, {tiny.adapter: math.nan}, error=ConfigError)
    quantize(tiny.original, tmp_path / "base", QosoraConfig(rank=7))
    perturbed(load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    pair = {tiny.adapter: 0.5, tmp_path / "adapter": 0.5}
    refused(tmp_path, "adapter was trained on the base with", tiny.base, pair, error=FingerprintError)


def refused(tmp_path: Path, match: str, *args: Any, error: type[Exception] = CheckpointError, **kwargs: Any) -> None:
    """Check that an export fails with one line and leaves nothing."""
    export = kwargs.pop("export", export_merged)
    with pytest.raises(error, match=match) as info:
        export(args[0], tmp_path / "out" / "export", *args[1:], **kwargs)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()


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
    options = {"original": tiny.original}
    refused(tmp_path, "an adapter was merged into this base", tmp_path / "base", onto="original", **options)
    model = perturbed(load(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    refused(tmp_path, "an adapter was merged", tmp_path / "base", adapter, export=export_lora, **options)
    export_merged(tmp_path / "base", tmp_path / "export", adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert relative_difference(logits(plain), logits(model)) < 1e-5


def test_lora_refuses_what_it_cannot_hold(tmp_path: Path):
    original = make_checkpoint(tmp_path / "original", "qwen3_moe-sparse")
    config = QosoraConfig(rank=8, modules_to_not_convert=[r"model\.layers\.1\.mlp\.experts\.2\.up_proj"])
    quantize(original, tmp_path / "base", config)
    perturbed(load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    refused(tmp_path, "all experts or none", tmp_path / "base", tmp_path / "adapter", export=export_lora)
    perturbed(load(tmp_path / "base"), target_modules=["q_proj"]).save_pretrained(tmp_path / "attention")
    report = export_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "attention")
    assert report.adapted_layers == 2
    with pytest.raises(ConfigError, match=r"2 problems:\n- dtype .*\n- rank must be .* got 0"):
        export_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "attention", dtype="int8", rank=0)


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
    states = []
    export: Any = export_lora if kind == "lora" else export_merged
    options: dict[str, Any] = {} if kind == "lora" else {"onto": kind, "max_shard_bytes": 20_000}
    export(tiny.base, output, tiny.adapter, progress=states.append, **options)
    assert states[0].done >= states[0].total // 2
    export(tiny.base, tmp_path / "undisturbed", tiny.adapter, **options)
    for file in (tmp_path / "undisturbed").glob("*.safetensors"):
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"export", "undisturbed"}
