"""Streaming conversion against `from_pretrained` + `save_pretrained`, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, decompose, load, logits, make_checkpoint, relative_difference
from transformers import AutoModelForCausalLM

from qosora.base.convert import own_device, quantize
from qosora.base.reports import by_kind
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.checkpoints.reader import CheckpointReader
from qosora.checkpoints.work import Processes, Progress
from qosora.config import QosoraConfig
from qosora.decompose.factorize import measure_error
from qosora.errors import CheckpointError, ConfigError
from qosora.export import export_merged
from qosora.layers.linear import qosora_modules


def config(family: str) -> QosoraConfig:
    names = {
        "gpt2": ("c_attn", "h.1.mlp.c_fc"),
        "phi3": ("qkv_proj", "layers.1.mlp.gate_up_proj"),
        "mixtral": ("w1", "layers.1.self_attn.o_proj"),
        **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), ("gate_proj", "layers.1.self_attn.o_proj")),
    }
    query, skipped = names.get(family, ("q_proj", "layers.1.mlp.up_proj"))
    return QosoraConfig(rank=8, rank_pattern={query: 5}, modules_to_not_convert=[skipped])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.tensor(name) for name in reader.names()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tensors_as_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", family, dtype=dtype, max_shard_size="20KB")
    decompose(source, config(family)).save_pretrained(tmp_path / "loaded")
    quantize(source, tmp_path / "streamed", config(family), max_shard_bytes=20_000)

    loaded, streamed = tensors(tmp_path / "loaded"), tensors(tmp_path / "streamed")
    assert streamed.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert streamed[name].dtype == tensor.dtype, name
        assert torch.equal(streamed[name], tensor), name
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("loaded", "streamed")]
    assert configs[0] == configs[1]
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1


def test_the_base_loads_and_carries_the_other_files(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8))
    assert (tmp_path / "base" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "base" / "pytorch_model.bin").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(qosora_modules(model)) == 14


def test_dtype_is_that_of_what_is_not_decomposed(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    quantize(source, tmp_path / "full", QosoraConfig(rank=8))
    quantize(source, tmp_path / "half", QosoraConfig(rank=8), dtype=torch.bfloat16)
    full, half = tensors(tmp_path / "full"), tensors(tmp_path / "half")
    assert half["model.embed_tokens.weight"].dtype == torch.bfloat16
    # the weights are decomposed as they are stored, not as the rest is cast
    assert torch.equal(half["model.layers.0.mlp.up_proj.weight"], full["model.layers.0.mlp.up_proj.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_the_report_tells_the_errors(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    states: list[Progress] = []
    report = quantize(source, tmp_path / "base", QosoraConfig(rank=8), progress=states.append)
    assert [state.done for state in states] == list(range(states[0].total + 1))
    assert [r["name"] for r in states[-1].reports.values() if r] == [layer.name for layer in report.layers]
    assert len(report.layers) == 14
    assert report.base_bytes == states[-1].total_bytes == sum(t.nbytes for t in tensors(tmp_path / "base").values())

    original = AutoModelForCausalLM.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for layer in report.layers:
        expected = measure_error(
            original.get_parameter(f"{layer.name}.weight").detach(), base.get_submodule(layer.name).factors
        )
        assert layer.error == expected.error
        assert layer.nf4_error == expected.nf4_error
        assert layer.bits_per_parameter == expected.bits_per_parameter
        assert layer.shape == (base.get_submodule(layer.name).out_features, base.get_submodule(layer.name).in_features)


def test_the_manifest_says_what_the_base_is(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    report = quantize(source, tmp_path / "base", QosoraConfig(rank=8, seed=3))
    manifest = json.loads((tmp_path / "base" / MANIFEST_NAME).read_text())
    assert manifest["source"] == "../source"
    assert manifest["source_files"] == {"model.safetensors": (source / "model.safetensors").stat().st_size}
    assert (manifest["made_with"]["rank"], manifest["made_with"]["seed"]) == (8, 3)
    assert manifest["made_with"]["torch"] == torch.__version__
    kinds = report.by_kind()
    assert by_kind(manifest["layers"]) == {
        kind: {key: value for key, value in row.items() if key != "seconds"} for kind, row in kinds.items()
    }
    for name, file in manifest["files"].items():
        content = (tmp_path / "base" / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["files"].keys() | {MANIFEST_NAME} == {file.name for file in (tmp_path / "base").iterdir()}


class Stop(Exception):
    pass


def test_an_interrupted_conversion_goes_on_to_the_same_base(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", max_shard_size="20KB")

    def stop(state: Progress) -> None:
        if state.done == 9:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "base", QosoraConfig(rank=8), max_shard_bytes=20_000, progress=stop)
    assert not (tmp_path / "base").exists()
    with pytest.raises(ConfigError, match="rank was 8, is 4, tensors was"):
        quantize(source, tmp_path / "base", QosoraConfig(rank=4), max_shard_bytes=20_000)
    states: list[Progress] = []
    report = quantize(source, tmp_path / "base", QosoraConfig(rank=8), max_shard_bytes=20_000, progress=states.append)
    assert states[0].done == 9
    assert len(report.layers) == 14
    quantize(source, tmp_path / "undisturbed", QosoraConfig(rank=8), max_shard_bytes=20_000)
    assert contents(tmp_path / "base") == contents(tmp_path / "undisturbed")
    assert not (tmp_path / "base.partial").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pickled_weights_are_read_safely(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    quantize(source, tmp_path / "expected", QosoraConfig(rank=8))
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    quantize(source, tmp_path / "base", QosoraConfig(rank=8))
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "base")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def damage(source: Path, change: str) -> None:
    file = source / "model.safetensors"
    state = load_file(file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return
    if change == "nan":
        state["model.layers.1.self_attn.k_proj.weight"][3, 4] = float("nan")
    elif change == "nan in a norm":
        state["model.norm.weight"][3] = float("nan")
    elif change == "missing tensor":
        del state["model.layers.1.mlp.down_proj.weight"]
    elif change == "wrong shape":
        state["model.norm.weight"] = torch.ones(7)
    elif change == "wrong weight shape":
        state["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 57)
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("nan", r"model.layers.1.self_attn.k_proj.weight: 1 of 512 values are NaN or infinite"),
        ("nan in a norm", r"model.norm.weight holds NaN or infinity"),
        ("missing tensor", r"1 tensors .* 'model.layers.1.mlp.down_proj.weight'"),
        ("wrong shape", r"model.norm.weight has shape \(7,\), but config.json makes it \(32,\)"),
        ("wrong weight shape", r"mlp.down_proj.weight has shape \(32, 57\), but config.json makes it \(32, 56\)"),
    ],
)
def test_a_damaged_source_is_refused_by_name_and_nothing_is_made(change: str, message: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    damage(source, change)
    with pytest.raises(CheckpointError, match=message):
        quantize(source, tmp_path / "out" / "base", QosoraConfig(rank=8))
    assert not (tmp_path / "out" / "base").exists()
    kept = (tmp_path / "out" / "base.partial").exists()
    assert kept == change.startswith("nan")  # found late, when other tensors were finished
    if kept:
        make_checkpoint(tmp_path / "whole")
        shutil.copyfile(tmp_path / "whole" / "model.safetensors", source / "model.safetensors")
        quantize(source, tmp_path / "out" / "base", QosoraConfig(rank=8))
        expected = tensors(tmp_path / "out" / "base")
        quantize(tmp_path / "whole", tmp_path / "undisturbed", QosoraConfig(rank=8))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(tmp_path / "undisturbed").items())


def test_sources_that_cannot_be_converted(tmp_path: Path) -> None:
    base = tmp_path / "base"
    quantize(make_checkpoint(tmp_path / "source"), base, QosoraConfig(rank=8))
    with pytest.raises(CheckpointError, match="quantized already \\(qosora\\)"):
        quantize(base, tmp_path / "again", QosoraConfig(rank=8))
    with pytest.raises(CheckpointError, match="which is being read"):
        quantize(tmp_path / "source", tmp_path / "source", QosoraConfig(rank=8), overwrite=True)
    with pytest.raises(CheckpointError, match="no such file"):
        quantize(tmp_path / "model.gguf", tmp_path / "again")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no model there that transformers can load"):
        quantize(tmp_path / "empty", tmp_path / "again")
    with pytest.raises(ConfigError, match="no linear layer left"):
        quantize(tmp_path / "source", tmp_path / "again", QosoraConfig(modules_to_not_convert=["proj"]))
    assert not (tmp_path / "again").exists()


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(source, tmp_path / "base", QosoraConfig(rank=8))
    assert (tmp_path / "base" / "mine.txt").read_text() == "precious"
    with pytest.raises(CheckpointError, match=r"holds 'mine\.txt' and no model"):
        quantize(source, tmp_path / "base", QosoraConfig(rank=8), overwrite=True)
    assert (tmp_path / "base" / "mine.txt").read_text() == "precious"

    quantize(source, tmp_path / "other", QosoraConfig(rank=8))
    before = tensors(tmp_path / "other")
    quantize(source, tmp_path / "other", QosoraConfig(rank=4), overwrite=True)
    assert len(tensors(tmp_path / "other")["model.layers.0.mlp.up_proj.s"]) == 4
    assert len(before["model.layers.0.mlp.up_proj.s"]) == 8


def test_a_head_of_its_own_in_spite_of_a_tied_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_checkpoint(tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    logging.getLogger("qosora").propagate = True
    with caplog.at_level(logging.WARNING, "qosora"):
        quantize(source, tmp_path / "base", QosoraConfig(rank=8))
    assert "lm_head.weight is not the copy of model.embed_tokens.weight that config.json makes it: kept" in caplog.text
    assert json.loads((tmp_path / "base" / "config.json").read_text())["tie_word_embeddings"] is False
    expected = logits(load(source))
    assert relative_difference(logits(load(tmp_path / "base")), expected) < 0.5  # 1.5 with the embeddings as the head
    export_merged(tmp_path / "base", tmp_path / "merged")
    assert relative_difference(logits(load(tmp_path / "merged")), expected) < 0.5
    # A copy is a copy, and only one is kept.
    stored = load_file(source / "model.safetensors")
    save_file(
        {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    quantize(source, tmp_path / "tied", QosoraConfig(rank=8))
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")


def test_more_processes_than_gpus_share_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes = Processes()
    found = []
    for processes.local_index in range(3):
        found.append(own_device(processes))
    assert found == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(processes) == "cpu"
