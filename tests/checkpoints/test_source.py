"""Checkpoints in every format against transformers' own loading of them, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from read_state import assert_equal, read
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qosora.checkpoints.source import open_source
from qosora.errors import CheckpointError


def test_safetensors_win(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    with open_source(folder) as source:
        assert_equal(read(source.reader), load_file(folder / "model.safetensors"))
        assert source.files == (folder / "model.safetensors",)


# What transformers would load is what is read.


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The same model with other values, as each kind of files that a folder may have."""
    found = {}
    for seed, (kind, shards) in enumerate(itertools.product(("safetensors", "pickled"), (False, True))):
        folder = tmp_path_factory.mktemp("kind")
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config())
        if kind == "safetensors":
            model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
        else:
            state = model.state_dict()
            names, stem = list(state), "pytorch_model"
            parts = [names[:3], names[3:]] if shards else [names]
            files = [f"{stem}-0000{i}-of-00002.bin" if shards else f"{stem}.bin" for i in (1, 2)]
            for file, part in zip(files, parts, strict=False):
                torch.save({name: state[name] for name in part}, folder / file)
            if shards:
                places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
                index = {"metadata": {"total_size": 1}, "weight_map": places}
                (folder / f"{stem}.bin.index.json").write_text(json.dumps(index))
        found[f"{kind} {shards}"] = sorted(path for path in folder.iterdir() if "config" not in path.name)
    return found


def loaded_by_transformers(folder: Path) -> torch.Tensor | None:
    try:
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    except Exception:
        return None
    return found


def read_by_us(folder: Path) -> torch.Tensor | None:
    try:
        with open_source(folder) as source:
            return source.reader.tensor("model.embed_tokens.weight")
    except CheckpointError:
        return None


@pytest.mark.parametrize("count", range(5))
def test_stale_files_beside_new_ones(kinds: dict[str, list[Path]], count: int, tmp_path: Path) -> None:
    """Whatever of them is there, whole or with a file missing."""
    for number, present in enumerate(itertools.combinations(kinds, count)):
        for broken in (None, *present):
            folder = tmp_path / f"{number} {broken}"
            folder.mkdir()
            tiny_config().save_pretrained(folder)
            for kind in present:
                files = [file for file in kinds[kind] if not (kind == broken and file == _last_weights(kinds[kind]))]
                for file in files:
                    shutil.copy(file, folder)
            theirs, ours = loaded_by_transformers(folder), read_by_us(folder)
            assert (theirs is None) == (ours is None), (present, broken)
            assert theirs is None or ours is None or torch.equal(theirs, ours), (present, broken)


def _last_weights(files: list[Path]) -> Path:
    return [file for file in files if file.suffix != ".json"][-1]


def test_files_that_config_json_names(kinds: dict[str, list[Path]], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    torch.manual_seed(7)
    other = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    save_file({n: t.clone() for n, t in other.state_dict().items()}, folder / "other.safetensors", {"format": "pt"})
    edit(folder / "config.json", transformers_weights="other.safetensors")
    theirs, ours = loaded_by_transformers(folder), read_by_us(folder)
    assert theirs is not None
    assert ours is not None
    assert torch.equal(theirs.float(), ours.float())
    for name in ("../other.safetensors", "/etc/x.safetensors", "other.bin", 3, ["other.safetensors"]):
        edit(folder / "config.json", transformers_weights=name)
        with (
            pytest.raises(CheckpointError, match=r"transformers_weights must name a safetensors file"),
            open_source(folder),
        ):
            pass


def test_an_adapter_in_the_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds adapter_config.json, so transformers would"), open_source(folder):
        pass


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
