"""llama.cpp's programs: which are found, and what is said of those that are not there, fail or refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import stand_in_llama_cpp

from qosora.errors import CheckpointError, ConfigError, DependencyError
from qosora.export import llama_cpp
from qosora.export.llama_cpp import Server, find_llama_cpp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stand_in_llama_cpp.make(tmp_path / "llama.cpp", "llama-quantize", "llama-server")


@pytest.fixture(autouse=True)
def _nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is on this machine's path nor its packages."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)


def test_a_folder_is_searched_then_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = find_llama_cpp(folder, quantizer=True, server=True)
    assert found.converter[-1] == str(folder / "convert_hf_to_gguf.py")
    assert found.quantizer == str(folder / "build/bin/llama-quantize")
    assert found.server is not None
    assert found.server[0] == str(folder / "build/bin/llama-server")
    (folder / "convert_hf_to_gguf.py").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert find_llama_cpp(None, quantizer=False, server=False).converter[-1] == found.converter[-1]


def test_the_package_serves_where_the_program_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = stand_in_llama_cpp.make(tmp_path / "llama.cpp")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: name == "xllamacpp" or None)
    found = find_llama_cpp(folder, quantizer=False, server=True).server
    assert found is not None
    assert "xllamacpp" in found[-1]


@pytest.mark.parametrize(
    ("programs", "quantizer", "server", "match"),
    [
        ((), True, False, "llama-quantize is not in .*llama.cpp or on the path"),
        ((), True, True, "llama-quantize and llama-server .or the package xllamacpp. are not in"),
        (("llama-quantize",), True, True, "llama-server"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, programs: tuple[str, ...], quantizer: bool, server: bool, match: str):
    folder = stand_in_llama_cpp.make(tmp_path / "llama.cpp", *programs)
    with pytest.raises(DependencyError, match=match):
        find_llama_cpp(folder, quantizer=quantizer, server=server)


def test_no_llama_cpp_at_all(tmp_path: Path):
    with pytest.raises(DependencyError, match=r"its converter, convert_hf_to_gguf.py is not on the path.*--llama-cpp"):
        find_llama_cpp(None, quantizer=False, server=False)
    with pytest.raises(ConfigError, match="must be a folder"):
        find_llama_cpp(tmp_path / "nowhere", quantizer=False, server=False)


def test_convert_and_quantize(folder: Path, tmp_path: Path):
    programs = find_llama_cpp(folder, quantizer=True, server=False)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    programs.convert(model, tmp_path / "a.gguf", "f16")
    assert (tmp_path / "a.gguf").read_text() == "f16 of ['model.safetensors']"
    programs.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m")
    assert (tmp_path / "b.gguf").read_text() == "Q4_K_M of f16 of ['model.safetensors']"
    with pytest.raises(CheckpointError, match=r"cannot quantize to q4_0: .*(No such file|FileNotFoundError)"):
        programs.quantize(tmp_path / "none.gguf", tmp_path / "c.gguf", "q4_0")


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ("NotImplementedError: Architecture 'X' not supported!", CheckpointError, "cannot write this model.*'X'"),
        ("ModuleNotFoundError: No module named 'sentencepiece'", DependencyError, "needs a package.*sentencepiece"),
    ],
)
def test_a_converter_that_refuses(folder: Path, tmp_path: Path, said: str, error: type[Exception], match: str):
    (folder / "fail").write_text(said)
    with pytest.raises(error, match=match):
        find_llama_cpp(folder, quantizer=False, server=False).convert(tmp_path, tmp_path / "a.gguf", "f16")


def test_a_server_is_asked(folder: Path, tmp_path: Path):
    programs = find_llama_cpp(folder, quantizer=False, server=True)
    with Server(programs, tmp_path / "a.gguf") as server:
        assert server.tokens("ab") == [97, 98]
        assert server.continued([5, 7], 2) == [8, 9]
        assert server.likeliest([5, 7], 3) == {7: -1.0, 8: -2.0, 9: -3.0}
        with pytest.raises(CheckpointError, match=r"refuses completion: .*empty prompt"):
            server.continued([], 1)
        process = server._process
    assert process.poll() is not None


def test_a_server_that_does_not_load(folder: Path, tmp_path: Path):
    programs = find_llama_cpp(folder, quantizer=False, server=True)
    with (
        pytest.raises(CheckpointError, match=r"does not load bad.gguf: error: wrong magic"),
        Server(programs, tmp_path / "bad.gguf"),
    ):
        pass


def test_a_server_that_ends(folder: Path, tmp_path: Path):
    programs = find_llama_cpp(folder, quantizer=False, server=True)
    with Server(programs, tmp_path / "a.gguf") as server:
        server._process.kill()
        server._process.wait()
        with pytest.raises(CheckpointError, match="server ended: it ended by SIGKILL"):
            server.tokens("a")
