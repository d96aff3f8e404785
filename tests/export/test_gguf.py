"""Exports as GGUF: what is left behind, and that a file that says something else than the model is not kept.

With the stand-in of llama.cpp, whose file is text; with llama.cpp itself where LLAMA_CPP names a folder of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import stand_in_llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qosora.demo
from qosora import QosoraConfig
from qosora.base.convert import quantize
from qosora.base.load import load_tokenizer
from qosora.checkpoints.folders import read_json
from qosora.checkpoints.intact import verify_files
from qosora.checkpoints.names import MANIFEST_NAME
from qosora.errors import CheckpointError, ConfigError, DependencyError
from qosora.export import export_gguf, gguf
from qosora.export.llama_cpp import Server, find_llama_cpp

DEMO = Path(qosora.demo.__file__).parent / "assets" / "model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "base"
    quantize(DEMO, folder, QosoraConfig(rank=8))
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    return stand_in_llama_cpp.make(tmp_path / "llama.cpp", "llama-quantize", "llama-server")


class Faithful:
    """Says what the merged model says, as llama.cpp's server would; `off` and `shift` make it say something else."""

    off, shift, model = 0.0, 0, DEMO

    def __init__(self, *_: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        self._tokenizer = load_tokenizer(self.model)

    def __enter__(self) -> Faithful:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def tokens(self, text: str) -> list[int]:
        return [token + self.shift for token in self._tokenizer(text)["input_ids"]]

    @torch.no_grad()
    def likeliest(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        found = self._model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).topk(count)
        return {int(i): float(p) + self.off for i, p in zip(found.indices, found.values, strict=True)}


@pytest.fixture
def faithful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Faithful]:
    class Server(Faithful):
        model = tmp_path / "out.partial" / "extra" / "merged"

    monkeypatch.setattr(gguf, "Server", Server)
    return Server


def test_what_is_written(base: Path, programs: Path, tmp_path: Path):
    report = export_gguf(base, tmp_path / "out", llama_cpp=programs, ollama=True)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(["Modelfile", "out-Q8_0.gguf", MANIFEST_NAME])
    assert (tmp_path / "out" / "out-Q8_0.gguf").read_text() == "q8_0 of ['model.safetensors']"
    assert "FROM ./out-Q8_0.gguf\nTEMPLATE" in (tmp_path / "out" / "Modelfile").read_text()
    assert report.modelfile
    assert report.template
    assert report.total_bytes == len("q8_0 of ['model.safetensors']")
    assert report.to_dict()["merged"]["dtype"] == "bfloat16"
    assert verify_files(tmp_path / "out") == []
    assert read_json(tmp_path / "out" / MANIFEST_NAME)["base"] == "./base"  # nobody else's path
    assert not list(tmp_path.glob("out.*"))  # neither .merged nor .partial
    again: dict[str, Any] = {"llama_cpp": programs, "quant": "q4_k_m"}
    with pytest.raises(CheckpointError, match="not empty"):
        export_gguf(base, tmp_path / "out", **again)
    export_gguf(base, tmp_path / "out", overwrite=True, **again)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(["out-Q4_K_M.gguf", MANIFEST_NAME])
    assert (tmp_path / "out" / "out-Q4_K_M.gguf").read_text() == "Q4_K_M of auto of ['model.safetensors']"


def test_a_file_that_says_the_same_is_kept(base: Path, programs: Path, tmp_path: Path, faithful: type[Faithful]):
    found = export_gguf(base, tmp_path / "out", llama_cpp=programs, quant="f32", verify=True).verification
    assert found is not None
    assert found.mean_difference < 1e-4
    assert found.equal_top_tokens == 1
    assert found.tokens > found.places > 40
    assert read_json(tmp_path / "out" / MANIFEST_NAME)["verification"]["places"] == found.places


@pytest.mark.parametrize(
    ("fault", "value", "match"),
    [
        ("shift", 1, r"other tokens of 'The quick.*from the 1\. on"),
        ("off", 0.4, r"differs from the merged model by 0\.\d+ nats on average; f16 makes at most 0.05"),
    ],
)
def test_a_file_that_says_something_else_is_not_kept(
    base: Path, programs: Path, tmp_path: Path, faithful: type[Faithful], fault: str, value: float, match: str
):
    setattr(faithful, fault, value)
    with pytest.raises(CheckpointError, match=match):
        export_gguf(base, tmp_path / "out", llama_cpp=programs, quant="f16", verify=True)
    assert not list(tmp_path.glob("out*"))


def test_a_converter_that_refuses_leaves_nothing(base: Path, programs: Path, tmp_path: Path):
    (programs / "fail").write_text("NotImplementedError: BPE pre-tokenizer was not recognized")
    with pytest.raises(CheckpointError, match=r"cannot write this model as GGUF: .*not recognized"):
        export_gguf(base, tmp_path / "out", llama_cpp=programs)
    (programs / "fail").write_text("ModuleNotFoundError: No module named 'gguf'")
    with pytest.raises(DependencyError, match="needs a package"):
        export_gguf(base, tmp_path / "out", llama_cpp=programs)
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_export_goes_on_with_its_merging(
    base: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine = tmp_path / "out.merged"  # a folder that only looks like one of ours
    mine.mkdir()
    (mine / "config.json").write_text("{}")

    def stop(progress: Any) -> None:
        if progress.done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(base, tmp_path / "out", llama_cpp=programs, progress=stop)
    assert (tmp_path / "out.partial" / "extra" / "merged.partial" / "job.json").is_file()
    with pytest.raises(ConfigError, match=r"begun differently: gguf was 'q8_0', is 'f16'"):
        export_gguf(base, tmp_path / "out", llama_cpp=programs, quant="f16")
    seen: list[int] = []
    export_gguf(base, tmp_path / "out", llama_cpp=programs, progress=lambda state: seen.append(state.done))
    assert seen[0] >= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.cpp", "out", "out.merged"]
    with pytest.raises(CheckpointError, match="not empty"):
        export_gguf(base, tmp_path / "out", llama_cpp=programs)
    assert (mine / "config.json").read_text() == "{}"


def test_what_cannot_be_is_refused_before_the_work(base: Path, tmp_path: Path):
    bare = stand_in_llama_cpp.make(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"quant must be one of f32, .*got 'q9'"):
        export_gguf(base, tmp_path / "out", quant="q9", llama_cpp=bare)
    with pytest.raises(CheckpointError, match="is being read"):
        export_gguf(base, base, llama_cpp=bare)
    with pytest.raises(DependencyError, match="llama-quantize"):
        export_gguf(base, tmp_path / "out", quant="q5_k_m", llama_cpp=bare)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder of llama.cpp")
def test_llama_cpp_itself(base: Path, tmp_path: Path):
    """The demo's model, in every kind that its size allows, and the answer that transformers gives."""
    folder = os.environ["LLAMA_CPP"]
    for quant, limit in (("f32", 2e-3), ("bf16", 0.02), ("q8_0", 0.05), ("q4_0", 0.5)):
        found = export_gguf(base, tmp_path / quant, llama_cpp=folder, quant=quant, ollama=True, verify=True)
        assert found.verification is not None
        assert found.verification.mean_difference < limit
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    model = qosora.export_merged(base, tmp_path / "merged", dtype="float32")
    merged: Any = AutoModelForCausalLM.from_pretrained(model.output)
    question = tokenizer("Question: Ida has 3 hats and buys 4 more. How many hats does Ida have?\nAnswer:")["input_ids"]
    expected = merged.generate(torch.tensor([question]), max_new_tokens=16, do_sample=False)[0, len(question) :]
    with Server(find_llama_cpp(folder, quantizer=False, server=True), tmp_path / "f32" / "f32-F32.gguf") as server:
        got = server.continued(question, len(expected))
    assert got == [token for token in expected.tolist() if token != tokenizer.eos_token_id]
