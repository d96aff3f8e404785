"""The identity of a base: of its tensors alone, in memory and on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny import decompose, load, make_base, make_checkpoint, perturbed

from qosora import OsoraConfig
from qosora.adapter import model_fingerprint
from qosora.checkpoints.fingerprint import base_fingerprint, eight_bit_scales, group_modules
from qosora.checkpoints.folders import read_json
from qosora.checkpoints.reader import CheckpointReader
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError
from qosora.layers.linear import qosora_modules


def of_files(base: Path) -> str:
    with CheckpointReader(base) as reader:
        groups = group_modules(reader.names())
        return base_fingerprint(
            {name.removeprefix(f"{module}."): reader.slice(name) for name in names} for module, names in groups.items()
        )


def test_a_layers_stored_tensors_are_grouped(tmp_path: Path):
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "original", "gpt2"))
    with CheckpointReader(base) as reader:
        names = reader.names()
    groups = group_modules(names)
    assert sorted(groups) == sorted(qosora_modules(load(base)))
    parameters = dict(load(base).get_submodule("transformer.h.0.attn.c_attn").named_parameters())
    stored = {name.rpartition(".")[2] for name in groups["transformer.h.0.attn.c_attn"]}
    assert stored == set(parameters) - {"bias"}
    assert all(set(group) <= set(names) for group in groups.values())


def test_the_fingerprint_is_stable(tmp_path: Path):
    original = make_checkpoint(tmp_path / "original", "llama-bias")
    model = decompose(original)
    fingerprint = model_fingerprint(model)
    assert fingerprint is not None
    assert len(fingerprint) == 16
    assert model_fingerprint(decompose(original)) == fingerprint
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert of_files(tmp_path / "base") == fingerprint
    assert model_fingerprint(load(tmp_path / "base")) == fingerprint
    assert model_fingerprint(load(tmp_path / "base").to(torch.bfloat16)) == fingerprint
    assert model_fingerprint(load(tmp_path / "base").to(torch.float16)) == fingerprint

    adapted = perturbed(load(tmp_path / "base"))
    assert model_fingerprint(adapted) == fingerprint
    adapted.merge_adapter()
    assert model_fingerprint(adapted) == fingerprint
    adapted.unmerge_adapter()
    assert model_fingerprint(adapted) == fingerprint
    adapted.save_pretrained(tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_fingerprint"] == fingerprint
    reloaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert model_fingerprint(reloaded) == fingerprint
    merged = adapted.merge_and_unload()
    assert model_fingerprint(merged) != fingerprint


def test_the_fingerprint_tells_bases_apart(tmp_path: Path):
    originals = {
        "llama-bias": make_checkpoint(tmp_path / "llama-bias", "llama-bias"),
        "seed": make_checkpoint(tmp_path / "seed", "llama-bias", seed=1),
        "gpt2": make_checkpoint(tmp_path / "gpt2", "gpt2"),
        "bfloat16": make_checkpoint(tmp_path / "bfloat16", "llama-bias", dtype=torch.bfloat16),
    }
    sketched = {"rank": 4, "svd_oversampling": 2}  # a wider sketch of these small layers would make the SVD exact
    variants: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in originals),
        ("llama-bias", {"rank": 7}),
        ("llama-bias", {"rank_pattern": {"layers.1.mlp.up_proj": 7}}),
        ("llama-bias", sketched),
        ("llama-bias", {**sketched, "seed": 1}),
        ("llama-bias", {**sketched, "svd": "exact"}),
        ("llama-bias", {**sketched, "svd_iterations": 0}),
        ("llama-bias", {"blocksize": 128}),
        ("llama-bias", {"quant_type": "fp4"}),
        ("llama-bias", {"double_quant": False}),
        ("llama-bias", {"modules_to_not_convert": ["model.layers.1.mlp.up_proj"]}),
    ]
    found = [
        model_fingerprint(decompose(originals[name], QosoraConfig(**{"rank": 8, **options})))
        for name, options in variants
    ]
    assert len(set(found)) == len(variants), dict(zip(map(str, variants), found, strict=True))


def test_without_a_base_there_is_no_fingerprint(tmp_path: Path):
    assert model_fingerprint(torch.nn.Linear(3, 3)) is None
    model = decompose(make_checkpoint(tmp_path / "original", "llama-bias"))
    assert model_fingerprint(model.to("meta")) is None
    assert get_peft_model(model, OsoraConfig()).peft_config["default"].base_fingerprint is None


def test_reading_the_fingerprint_reads_little(tmp_path: Path):
    """A sample of each tensor, so that an adapter for a 70B base is checked in the time of opening files."""
    packed = torch.zeros(2**26, dtype=torch.uint8)
    layer = {"weight": packed, "weight_absmax": packed[:9], "U": packed, "U_absmax": packed[:9], "s": torch.ones(4)}
    start = time.perf_counter()
    base_fingerprint([layer] * 20)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("e.weight_scale"), "e.weight_scale, is missing"),
        (lambda t: t.pop("e.weight"), "e.weight, which must be of int8, is missing"),
        (lambda t: t.update({"e.weight": torch.zeros(3, 4)}), "e.weight, which must be of int8"),
        (lambda t: t.update({"e.weight_scale": torch.zeros(2)}), r"must be \(3,\), float32, got \(2,\)"),
        (lambda t: t.update({"e.weight_scale": torch.zeros(3).half()}), "float32, got .* torch.float16"),
    ],
    ids=["no scale", "no matrix", "no int8", "shape", "dtype"],
)
def test_scales_of_matrices_in_8_bits(change: Any, message: str, tmp_path: Path):
    tensors = {"e.weight": torch.zeros(3, 4, dtype=torch.int8), "e.weight_scale": torch.zeros(3), "n": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert eight_bit_scales(reader) == {"e.weight": "e.weight_scale"}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=message):
        eight_bit_scales(reader)
