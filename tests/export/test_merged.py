"""Exports load where qosora cannot be imported, and give the adapted model's logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import edit_tensors, refused, tensors_of
from safetensors.torch import load_file, save_file
from tiny import (
    Trained,
    load,
    logits,
    make_base,
    make_checkpoint,
    perturbed,
    relative_difference,
    token_ids,
)
from transformers import AutoModelForCausalLM

from qosora.checkpoints.folders import read_json, write_json
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.checkpoints.work import Progress
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.export import export_merged
from qosora.layers.linear import qosora_modules

FAMILIES = (
    "llama-bias",
    "llama-tied",
    "mistral",
    "mixtral",
    "qwen3_moe-sparse",
    "qwen3",
    "gemma3",
    "gemma3-vision",
    "gpt2",
)


#: Runs with -I, so that neither PYTHONPATH nor the current folder count; the finder covers an installed qosora.
LOAD_WITHOUT_QOSORA = """
import sys, warnings

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qosora":
            raise ModuleNotFoundError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import qosora
except ModuleNotFoundError:
    pass
else:
    sys.exit("qosora can be imported")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids = load_file(sys.argv[1])["ids"]
results = {}
for folder in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    if problems or getattr(model.config, "quantization_config", None):
        sys.exit(f"{folder}: {problems}, {model.config}")
    with torch.no_grad():
        results[folder] = model.eval()(input_ids=ids).logits
save_file(results, sys.argv[2])
"""


def logits_without_qosora(folders: list[Path], scratch: Path) -> dict[str, torch.Tensor]:
    """Load exports in a process that cannot import qosora; return their logits by folder."""
    save_file({"ids": token_ids()}, scratch / "ids.safetensors")
    result = scratch / "logits.safetensors"
    command = [sys.executable, "-I", "-c", LOAD_WITHOUT_QOSORA, str(scratch / "ids.safetensors"), str(result)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *map(str, folders)],
        cwd=scratch,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(result)


@pytest.mark.slow
def test_plain_transformers_gives_the_adapted_logits(tmp_path: Path):
    expected, unadapted = {}, {}
    for family in FAMILIES:
        folder = tmp_path / family
        base = make_base(folder / "base", make_checkpoint(folder / "original", family), max_shard_size="20KB")
        assert (base / "model.safetensors.index.json").is_file()
        model = load(base)
        output = folder / "export"
        unadapted[str(output)] = logits(model)
        model = perturbed(model)
        model.save_pretrained(folder / "adapter")
        expected[str(output)] = logits(model)
        report = export_merged(base, output, folder / "adapter", dtype="float32", max_shard_bytes=50_000)
        assert report.shard_count == len(list(output.glob("*.safetensors"))) > 1
        assert report.merged_layers == report.adapted_layers == len(list(qosora_modules(model)))
        assert report.total_bytes == sum(t.nbytes for t in tensors_of(output).values())
        assert sorted(tensors_of(output)) == sorted(tensors_of(folder / "original"))
    # Variants that only one family needs to show.
    for name, options in (("s", {"vectors": "s"}), ("o", {"vectors": "o"}), ("layer", {"layers_to_transform": [1]})):
        folder = tmp_path / "llama-bias"
        model = perturbed(load(folder / "base"), **options)
        model.save_pretrained(folder / name)
        report = export_merged(folder / "base", tmp_path / name, folder / name, dtype=torch.float32)
        assert report.adapted_layers == (7 if name == "layer" else 14)
        expected[str(tmp_path / name)] = logits(model)
        unadapted[str(tmp_path / name)] = unadapted[str(tmp_path / "llama-bias" / "export")]

    got = logits_without_qosora([Path(folder) for folder in expected], tmp_path)
    for place, wanted in expected.items():
        assert relative_difference(got[place], wanted) < 1e-5, place
        assert relative_difference(unadapted[place], wanted) > 0.05, place  # the adapter matters


@pytest.mark.parametrize(
    ("family", "modules", "untied"),
    [
        ("llama-bias", ["lm_head", "norm"], []),
        ("llama-tied", ["lm_head"], ["lm_head.weight"]),
        ("llama-tied", ["embed_tokens"], ["lm_head.weight"]),
        ("llama-tied", ["embed_tokens", "lm_head"], ["lm_head.weight"]),
        ("gpt2", ["ln_f", "lm_head"], ["lm_head.weight"]),
        ("gemma3-vision", ["lm_head"], ["lm_head.weight"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_to_save_replace_the_bases(tmp_path: Path, family: str, modules: list[str], untied: list[str]):
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "original", family))
    model = perturbed(load(base), modules_to_save=modules)
    model.save_pretrained(tmp_path / "adapter")
    report = export_merged(base, tmp_path / "export", tmp_path / "adapter")
    assert report.untied == [name if family != "gemma3-vision" else "language_model.lm_head.weight" for name in untied]
    assert len(report.replaced) >= len(modules)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert not plain.config.get_text_config().tie_word_embeddings
    assert relative_difference(logits(plain), logits(model)) < 1e-5


def test_a_tied_embedding_that_did_not_move_stays_tied(tiny: Trained, copies: Trained, tmp_path: Path):
    embedding = tensors_of(tiny.base)["model.embed_tokens.weight"]
    key = "base_model.model.lm_head.weight"
    edit_tensors(copies.adapter / "adapter_model.safetensors", lambda t: t.update({key: embedding}))
    report = export_merged(copies.base, tmp_path / "export", copies.adapter)
    assert report.untied == []
    assert "lm_head.weight" not in tensors_of(tmp_path / "export")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_without_an_adapter_it_is_what_dequantize_gives(tmp_path: Path, family: str):
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "original", family))
    report = export_merged(base, tmp_path / "export")
    assert (report.adapters, report.adapted_layers, report.dtype) == ({}, 0, "float32")
    model = load(base)
    model.dequantize()
    exported = tensors_of(tmp_path / "export")
    state = model.state_dict()
    assert set(state) - set(exported) == {"lm_head.weight"}
    assert all(torch.equal(exported[name], state[name]) for name in exported)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_cast_once_from_float32(tiny: Trained, tmp_path: Path, dtype: str):
    export_merged(tiny.base, tmp_path / "float32", tiny.adapter, dtype="float32")
    report = export_merged(tiny.base, tmp_path / dtype, tiny.adapter, dtype=dtype)
    wide, narrow = tensors_of(tmp_path / "float32"), tensors_of(tmp_path / dtype)
    assert report.dtype == dtype
    assert read_json(tmp_path / dtype / "config.json")["dtype"] == dtype
    assert all(torch.equal(narrow[name], wide[name].to(getattr(torch, dtype))) for name in wide)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype == getattr(torch, dtype)


def test_a_bfloat16_base_stays_so_by_default(tmp_path: Path):
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "original", "llama-bias", dtype=torch.bfloat16))
    report = export_merged(base, tmp_path / "export")
    assert report.dtype == "bfloat16"
    assert {t.dtype for t in tensors_of(tmp_path / "export").values()} == {torch.bfloat16}
    wide = load(base).get_submodule("model.layers.1.mlp.up_proj").dequantize()
    assert torch.equal(tensors_of(tmp_path / "export")["model.layers.1.mlp.up_proj.weight"], wide.bfloat16())


def test_another_quantization_format(tmp_path: Path):
    original = make_checkpoint(tmp_path / "original", "llama-bias")
    options: dict[str, Any] = {
        "quant_type": "fp4",
        "blocksize": 32,
        "double_quant": False,
        "rank": 1000,
        "rank_pattern": {"v_proj": 1},
    }
    base = make_base(tmp_path / "base", original, QosoraConfig(**options))
    model = perturbed(load(base))
    model.save_pretrained(tmp_path / "adapter")
    export_merged(base, tmp_path / "export", tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert relative_difference(logits(plain), logits(model)) < 1e-5


def test_what_is_carried_along(copies: Trained, tmp_path: Path):
    base, adapter = copies.base, copies.adapter
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "pytorch_model.bin"):
        (base / name).write_text("base")
    (base / "modeling_tiny.py").write_text("")
    write_json(base / "config.json", {**read_json(base / "config.json"), "auto_map": {"AutoModel": "modeling_tiny.X"}})
    first = export_merged(base, tmp_path / "first", adapter)
    assert first.tokenizer_from == str(base)
    carried = {file.name for file in (tmp_path / "first").iterdir()}
    assert carried == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        MANIFEST_NAME,
    }
    config = read_json(tmp_path / "first" / "config.json")
    assert not {"quantization_config", "auto_map"} & set(config)

    for name in ("tokenizer.json", "tokenizer.pkl", "trainer_state.json"):
        (adapter / name).write_text("adapter")
    second = export_merged(base, tmp_path / "second", adapter)
    assert second.tokenizer_from == str(adapter)
    carried = {file.name for file in (tmp_path / "second").iterdir()}
    assert "tokenizer_config.json" not in carried  # not a mixture of two tokenizers
    assert not {"chat_template.jinja", "tokenizer.pkl", "trainer_state.json"} & carried
    assert (tmp_path / "second" / "tokenizer.json").read_text() == "adapter"


def test_progress_counts_up(tiny: Trained, tmp_path: Path):
    states: list[Progress] = []
    report = export_merged(tiny.base, tmp_path / "export", progress=states.append)
    assert [state.done for state in states] == list(range(report.tensor_count + 1))
    assert {state.total for state in states} == {report.tensor_count}
    assert {state.total_bytes for state in states} == {states[-1].done_bytes} == {report.total_bytes}
    json.dumps(report.to_dict())


def test_readable_by_others(tiny: Trained, tmp_path: Path):
    export_merged(tiny.base, tmp_path / "export")
    reference = tmp_path / "reference"
    reference.touch()
    mode = reference.stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "export").iterdir()} == {mode}


class Stop(Exception):
    pass


def stop_late(state: Progress) -> None:
    if state.done > state.total // 2:
        raise Stop


def test_stopped_in_the_middle_it_goes_on_from_there(tiny: Trained, tmp_path: Path):
    output = tmp_path / "new" / "export"
    with pytest.raises(Stop):
        export_merged(tiny.base, output, max_shard_bytes=10_000, progress=stop_late)
    assert not output.exists()
    states: list[Progress] = []
    export_merged(tiny.base, output, max_shard_bytes=10_000, progress=states.append)
    assert states[0].done > states[0].total // 2
    assert list((tmp_path / "new").iterdir()) == [output]
    export_merged(tiny.base, tmp_path / "undisturbed", max_shard_bytes=10_000)
    assert contents(output) == contents(tmp_path / "undisturbed")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_overwriting_keeps_the_old_until_the_new_is_complete(tiny: Trained, tmp_path: Path):
    output = tmp_path / "export"
    export_merged(tiny.base, output, max_shard_bytes=50_000)
    old = contents(output)
    with pytest.raises(CheckpointError, match="not empty"):
        export_merged(tiny.base, output, tiny.adapter)
    with pytest.raises(Stop):
        export_merged(tiny.base, output, tiny.adapter, overwrite=True, progress=stop_late)
    assert contents(output) == old
    export_merged(tiny.base, output, tiny.adapter, overwrite=True)
    assert contents(output).keys() == {"config.json", "generation_config.json", "model.safetensors", MANIFEST_NAME}
    assert list(tmp_path.iterdir()) == [output]


def test_bad_options_are_reported_together(tiny: Trained, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"2 problems:\n- dtype .*'int8'\n- max_shard_bytes"):
        export_merged(tiny.base, tmp_path / "export", dtype="int8", max_shard_bytes=0)


def test_float16_overflow_is_named(tiny: Trained, copies: Trained, tmp_path: Path):
    key = "base_model.model.model.layers.1.mlp.down_proj.osora_o"
    edit_tensors(copies.adapter / "adapter_model.safetensors", lambda t: t[key].fill_(1e6))
    refused(tmp_path, "layers.1.mlp.down_proj.weight.*float16", tiny.base, copies.adapter, dtype="float16", kept=True)
    assert export_merged(tiny.base, tmp_path / "wide", copies.adapter, dtype="bfloat16").dtype == "bfloat16"


def test_an_output_that_must_not_be_replaced(tiny: Trained, copies: Trained, tmp_path: Path):
    with pytest.raises(CheckpointError, match="which is being read"):
        export_merged(copies.base, copies.base, overwrite=True)
    with pytest.raises(CheckpointError, match="which is being read"):
        export_merged(tiny.base, copies.adapter.parent, copies.adapter, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds 'thesis.tex' and no model"):
        export_merged(tiny.base, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        export_merged(tiny.base, tmp_path / "file", overwrite=True)


def test_a_full_disk(tiny: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 1000, 1000))
    refused(tmp_path, "0.0 MiB are free", tiny.base)
