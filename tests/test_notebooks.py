"""The notebooks run, whole, in a kernel, on the demo's model and data; they are stored without output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import stand_in_llama_cpp
from nbclient import NotebookClient

from qosora.demo import assets

FOLDER = Path(__file__).parent.parent / "examples"


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> str:
    """Run a notebook with other values in its cell of parameters; return what it printed."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    tagged["install"].source = ""
    defined: dict[str, Any] = {}
    exec(tagged["parameters"].source, defined)
    assert parameters.keys() <= defined.keys()
    tagged["parameters"].source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    done = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    return "".join(str(output.get("text") or output.get("data", "")) for output in outputs)


@pytest.fixture
def parameters(tmp_path: Path) -> dict[str, Any]:
    with assets() as source:
        data = {"DATA": str(source / "train.jsonl"), "HELD_OUT": str(source / "test.jsonl")}
        return {"MODEL": str(source / "model"), **data, "RANK": 8, "MAX_LENGTH": 64, "MAX_STEPS": 2}


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.ipynb")])
def test_stored_without_output(name: str):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_a_7b_on_16_gb(tmp_path: Path, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    text = executed("finetune_7b_16gb", tmp_path, monkeypatch, **parameters)
    assert "fits on a T4" in text
    assert "evaluation loss" in text
    assert "Answers of adapter" in text
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_from_plan_to_gguf(tmp_path: Path, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    llama_cpp = stand_in_llama_cpp.make(tmp_path / "llama.cpp")
    text = executed("plan_to_gguf", tmp_path, monkeypatch, **parameters, LLAMA_CPP=str(llama_cpp))
    assert "fits into RTX 4090" in text
    assert "exact match" in text
    assert "FROM ./gguf-Q8_0.gguf" in text
    assert "error:" not in text
