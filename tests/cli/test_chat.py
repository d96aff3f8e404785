"""`qosora chat`: its commands, and columns of answers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from seeing import make_seeing, squares
from tiny import make_base, make_checkpoint, perturbed

from qosora.base import quantize
from qosora.base.load import load_base
from qosora.cli import main
from qosora.cli.chat import side_by_side
from qosora.config import QosoraConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    make_base(folder / "base", make_checkpoint(folder / "llama", "llama-text"), QosoraConfig(rank=8))
    for seed in (1, 2):
        perturbed(load_base(folder / "base"), seed=seed).save_pretrained(folder / f"adapter-{seed}")
    return folder


def test_a_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    lines = [
        "1+1=", "", f"/adapter {folder}/adapter-2", "1+1=", "/compare 2+2=", "/adapter base", "/adapter nobody",
        "/help",
        "/system Be brief.", "1+1=", "/forget", "1+1=", "/quit", "never said",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["chat", str(folder / "adapter-1"), "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("base, adapter-1: adapter-1 answers. /adapter NAME, ")
    assert "adapter-2 answers from now on" in out
    assert "base answers from now on" in out
    head = next(line for line in out.splitlines() if line.startswith("base  "))
    assert [cell.strip() for cell in head.split("|")] == ["base", "adapter-1", "adapter-2"]
    assert "/adapter NAME, /compare TEXT" in out
    assert "error: there is no 'nobody': there are base, adapter-1, adapter-2" in err
    assert "never said" not in out


def test_what_a_turn_cannot_do_is_told_and_the_next_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ud800\n1+1=\n"))
    assert main(["chat", str(folder / "base"), "--max-new-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1
    assert len(out.splitlines()) >= 2


def test_images_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
):
    quantize(make_seeing(tmp_path / "llava"), tmp_path / "base", QosoraConfig(rank=8))
    squares(tmp_path / "pictures", 2)
    image = str(tmp_path / "pictures" / "0.png")
    options = ["--max-new-tokens", "4"]
    assert main(["generate", str(tmp_path / "base"), "--prompt", "colour?", "--image", image, "--chat", *options]) == 0
    generated = capsys.readouterr().out
    lines = ["/image none.png", f"/image {image}", "colour?", "and now?", "/forget", f"/image {image}", "colour?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(tmp_path / "base"), *options]) == 0
    out, err = capsys.readouterr()
    assert out.count(generated) >= 2
    assert err.count("error: ") == 1
    assert "none.png: no such image" in err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {image}\n"))
    assert main(["chat", str(folder / "base"), *options]) == 0
    assert "error: the model takes no images" in capsys.readouterr().err


def test_columns():
    texts = {"base": "one two three four five six seven", "a": "x\n\ny"}
    assert side_by_side(texts, 55).splitlines() == [
        "base                       | a",
        "-------------------------- | --------------------------",
        "one two three four five    | x",
        "six seven                  |",
        "                           | y",
    ]
    assert side_by_side(texts, 40) == "base:\none two three four five six seven\n\na:\nx\n\ny"
