"""Which name llama.cpp has for the way in which a tokenizer parts text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qosora.export import gguf_converter
from qosora.export.gguf_converter import name_of_pre_tokenizer

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def tokenizer(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"model": {"type": "BPE"}, "normalizer": None, "pre_tokenizer": pre, **more}


def split(pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}, {**BYTES, "use_regex": False}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (tokenizer(BYTES), "gpt-2"),
        (tokenizer(*split(LLAMA)), "llama-bpe"),
        (tokenizer(*split(LLAMA.replace("{1,3}", "")), normalizer={"type": "NFC"}), "qwen2"),
        (tokenizer(*split(r"\d+")), None),
        (tokenizer({**BYTES, "add_prefix_space": True}), None),
        (tokenizer({**BYTES, "use_regex": False}), None),
        (tokenizer({"type": "Whitespace"}), None),
        (tokenizer(BYTES, normalizer={"type": "Lowercase"}), None),
        (tokenizer(BYTES, model={"type": "Unigram"}), None),
        ({"model": {"type": "BPE"}, "pre_tokenizer": None}, None),
        ({}, None),
    ],
)
def test_names(given: dict[str, Any], name: str | None):
    assert name_of_pre_tokenizer(given) == name


def test_the_converter_is_helped_out_and_else_left_alone(tmp_path: Path):
    """Through the door that it has today, and without it."""
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\nfrom types import SimpleNamespace\nfrom pathlib import Path\n"
        "from conversion.base import TextModel\n"
        "print(sys.argv[1], TextModel.get_vocab_base_pre(SimpleNamespace(dir_model=Path(sys.argv[1])), None))\n"
    )
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "__init__.py").touch()
    base = tmp_path / "conversion" / "base.py"
    model = tmp_path / "model"
    model.mkdir()

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, gguf_converter.__file__, str(script), str(model)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    base.write_text(
        "class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        raise NotImplementedError('?')\n"
    )
    assert "NotImplementedError: ?" in run().stderr  # there is no tokenizer.json
    (model / "tokenizer.json").write_text(json.dumps(tokenizer(BYTES)))
    assert run().stdout.split() == [str(model), "gpt-2"]
    base.write_text("class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        return 'its own'\n")
    assert run().stdout.split(maxsplit=1)[1].strip() == "its own"
    base.write_text("")
    assert "cannot import name 'TextModel'" in run().stderr  # the script's own error
