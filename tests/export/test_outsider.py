"""The program that verifies exports: it cannot import qosora, computes in float32, and says in a line what is wrong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint, relative_difference, rounding, token_ids

import qosora.export.outsider
from qosora.export.outsider import _Refuse, compute_in_float32, logits

FILE = Path(qosora.export.outsider.__file__)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("outsider"), "llama-bias", dtype=torch.bfloat16)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two rows, the second with padding."""
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[1, 9:] = 0
    return {"input_ids": token_ids(), "attention_mask": mask}


def run(folder: Path, model: Path, inputs: dict[str, torch.Tensor]) -> subprocess.CompletedProcess[str]:
    save_file(inputs, folder / "inputs.safetensors")
    command = [sys.executable, "-I", FILE, model, folder / "inputs.safetensors", folder / "logits.safetensors"]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=folder)


def test_it_imports_nothing_of_qosora() -> None:
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert "torch" in modules
    assert not any(module.partition(".")[0] == "qosora" for module in modules)
    for name in ("qosora", "qosora.layers"):
        with pytest.raises(ModuleNotFoundError, match="is not to be imported here"):
            _Refuse().find_spec(name)
    _Refuse().find_spec("qosoraish")  # is for the other finders


def test_float32_products_of_16_bit_weights_which_stay(model: Path, inputs: dict[str, torch.Tensor]) -> None:
    narrow, wide = load(model), load(model).float()
    before = {name: (p.dtype, p.data_ptr()) for name, p in narrow.named_parameters()}
    compute_in_float32(narrow)
    found, expected = logits(narrow, **inputs), logits(wide, **inputs)
    assert found.shape == (17 + 9, 96)
    assert found.dtype == torch.float32
    assert relative_difference(found, expected) < rounding(torch.float32)
    assert {name: (p.dtype, p.data_ptr()) for name, p in narrow.named_parameters()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("process_of_its_own")
def test_the_program_writes_logits(model: Path, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    done = run(tmp_path, model, inputs)
    assert done.returncode == 0, done.stderr
    expected = logits(load(model).float(), **inputs)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert relative_difference(found, expected) < rounding(torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("process_of_its_own")
def test_the_program_says_in_its_last_line_what_is_wrong(tmp_path: Path, inputs: dict[str, torch.Tensor]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    done = run(tmp_path, tmp_path, inputs)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "logits.safetensors").exists()
