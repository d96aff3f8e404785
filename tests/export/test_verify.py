"""Verification: it passes for exports as they should be, and leaves nothing of others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Trained, load, make_checkpoint, make_trained, perturbed
from transformers import AutoModelForCausalLM

from qosora import QosoraConfig
from qosora.base.convert import quantize
from qosora.checkpoints.folders import read_json
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.errors import CheckpointError
from qosora.export import export_lora, export_merged
from qosora.export.stored import AdaptedBase


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Of a family with a tied embedding that is scaled, instead of that of the other tests."""
    return make_trained(tmp_path_factory.mktemp("verified"), "gemma3")


def test_all_kinds_pass(tiny: Trained, tmp_path: Path):
    base, adapter = tiny.base, tiny.adapter
    found: list[Any] = [
        export_merged(base, tmp_path / "merged", adapter, verify=True),
        export_merged(base, tmp_path / "onto", {adapter: 0.5}, onto="original", verify=True),
        export_lora(base, tmp_path / "lora", adapter, verify=True),
        export_lora(base, tmp_path / "reduced", adapter, rank=4, verify=True),
    ]
    exact, combined, lora, reduced = (report.verification for report in found)
    assert exact.reference == "base in 4 bits with the adapter"
    assert combined.reference == lora.reference == "original model with the adapter"
    for verified in (exact, combined, lora):
        assert verified.relative_difference < 1e-5
        assert verified.mean_difference < verified.largest_difference < 1e-4
        assert verified.equal_top_tokens > 0.99
        assert verified.tokens == 256
    assert 0.01 < reduced.relative_difference < reduced.tolerance < 0.9
    assert read_json(tmp_path / "lora" / MANIFEST_NAME)["verification"]["tokens"] == 256


def test_bfloat16_and_a_tokenizer(tmp_path: Path):
    original = make_checkpoint(tmp_path / "original", "llama-text")  # with a tokenizer
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(original)
    quantize(original, tmp_path / "base", QosoraConfig(rank=8))
    perturbed(load(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    found = export_merged(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter", verify=True).verification
    assert found is not None
    assert 2**-12 < found.relative_difference < 2**-5
    assert 200 < found.tokens < 256  # texts, cut
    lora = export_lora(tmp_path / "base", tmp_path / "lora", tmp_path / "adapter", verify=True).verification
    assert lora is not None
    assert lora.relative_difference < found.relative_difference  # only ΔW is rounded


@pytest.mark.slow
@pytest.mark.usefixtures("process_of_its_own")
def test_lora_of_experts_in_bfloat16(tmp_path: Path):
    trained = make_trained(tmp_path, "mixtral", dtype=torch.bfloat16)
    found = export_lora(trained.base, tmp_path / "lora", trained.adapter, verify=True).verification
    assert found is not None
    assert found.relative_difference < 2**-5


def wrong_vectors(self: AdaptedBase, layer: Any, factors: Any) -> torch.Tensor:
    return (
        merged(self, layer, factors) if "layers.1" in layer.module else torch.zeros_like(merged(self, layer, factors))
    )


merged = AdaptedBase.merged


@pytest.mark.slow
def test_a_wrong_export_leaves_nothing(tiny: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "new" / "export"
    monkeypatch.setattr(AdaptedBase, "merged", wrong_vectors)
    with pytest.raises(CheckpointError, match=r"logits differ .* by \d\.\d+ .* Nothing of the export is kept$") as info:
        export_merged(tiny.base, output, tiny.adapter, verify=True)
    assert "\n" not in str(info.value)
    assert list(tmp_path.iterdir()) == []
    # Neither what does not load
    monkeypatch.undo()
    monkeypatch.setattr("qosora.export.merged.copy_files", lambda folder, *_, **__: break_config(folder))
    monkeypatch.setattr("qosora.export.merged._write_config", lambda *_: None)
    shutil.copytree(tiny.original, output)
    with pytest.raises(
        CheckpointError, match=r"does not load where qosora cannot be imported: ValueError: .*unheard-of"
    ):
        export_merged(tiny.base, output, tiny.adapter, verify=True, overwrite=True)
    assert {file.name for file in output.iterdir()} == {file.name for file in tiny.original.iterdir()}
    assert list(output.parent.iterdir()) == [output]


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')


def test_a_wrong_lora_leaves_nothing(tiny: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    low_rank = AdaptedBase.low_rank
    monkeypatch.setattr(
        AdaptedBase, "low_rank", lambda *args: tuple(m.neg() for m in low_rank(*args)[:1]) + low_rank(*args)[1:]
    )
    with pytest.raises(CheckpointError, match="original model with the adapter by"):
        export_lora(tiny.base, tmp_path / "export", tiny.adapter, verify=True)
    assert list(tmp_path.iterdir()) == []
