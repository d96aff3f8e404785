"""The examples run, on the demo's model and data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_base, make_checkpoint, perturbed, sums, write_jsonl

from qosora import QosoraConfig, quantize
from qosora.base.load import load_base
from qosora.checkpoints.stored_config import adapter_config
from qosora.demo import assets

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_qlora_shaped_script(tmp_path: Path) -> None:
    with assets() as source:
        command = [sys.executable, ROOT / "examples" / "finetune_7b.py", "--model", source / "model"]
        command += ["--data", source / "train.jsonl", "--rank", "16", "--max-steps", "2", "--max-length", "128"]
        command += ["--base-dir", tmp_path / "base", "--output-dir", tmp_path / "adapter"]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "trainable params: 5,568" in run.stdout, run.stdout
    assert adapter_config(tmp_path / "adapter").vectors == "both"


@pytest.mark.slow
def test_the_ways_out(tmp_path: Path) -> None:
    quantize(make_checkpoint(tmp_path / "original", "llama-text"), tmp_path / "base", QosoraConfig(rank=8))
    perturbed(load_base(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, str(ROOT / "examples" / "export_merged.py"), "adapter", "out", "--base", "base"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["out/merged", "out/lora", "LlamaForCausalLM", "PeftModelForCausalLM"]  # fmt: skip  # noqa: E501
    assert "reference='original model with the adapter'" in lines[1]


@pytest.mark.slow
def test_profile_memory(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    command = [sys.executable, ROOT / "examples" / "profile_memory.py", base, "--seq-len", "16"]
    run = subprocess.run([*map(str, command), "--output-dir", "out"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "+0.00%" in run.stdout, run.stdout
    assert (tmp_path / "out" / "measured" / "memory.html").is_file()


@pytest.mark.slow
def test_the_configuration_for_two_cards(tmp_path: Path) -> None:
    """In one process, on a tiny base: that it says what it means is for the tests of several processes."""
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "source", "llama-text"))
    data = write_jsonl(tmp_path / "train.jsonl", sums(16))
    command = [
        sys.executable,
        "-m",
        "qosora",
        "train",
        "--config",
        ROOT / "examples" / "two_cards.yaml",
        "--model",
        base,
    ]
    command += ["--data", data, "--output-dir", tmp_path / "adapter", "--max-steps", "1", "--no-progress"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert adapter_config(tmp_path / "adapter").vectors == "both"
