"""llama.cpp's converter, for tokenizers that it has no name for.

    python gguf_converter.py LLAMA_CPP/convert_hf_to_gguf.py CHECKPOINT --outfile FILE --outtype KIND

How a byte-level tokenizer parts text before it joins bytes is known to llama.cpp by name only, and its converter finds
the name by a hash of the tokens of one text: of a vocabulary that is not in its list it refuses the model, although it
parts text as others do. Here the name is taken from what `tokenizer.json` says, where that is one that is known to be
the same; whether the tokens are the same then is what `--verify` looks at. It runs in a process of its own and imports
nothing of qosora. What it touches of llama.cpp (`conversion.base`) is documented nowhere.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

__all__ = ["name_of_pre_tokenizer"]

#: By the pattern that it splits at; byte-level with a regular expression of its own is GPT-2's.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}


def name_of_pre_tokenizer(tokenizer: dict[str, Any]) -> str | None:
    """Return what llama.cpp calls the way in which a `tokenizer.json` parts text, if it has a name for it."""
    if tokenizer.get("model", {}).get("type") != "BPE" or tokenizer.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", []) if found.get("type") == "Sequence" else [found]
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "gpt-2" if last.get("use_regex", True) else None
    if len(before) == 1 and before[0].get("type") == "Split" and not last.get("use_regex", True):
        return _PATTERNS.get(before[0].get("pattern", {}).get("Regex"))
    return None


def _main() -> None:
    script = Path(sys.argv.pop(1))
    sys.argv[0] = str(script)
    sys.path[:1] = [str(script.parent), str(script.parent / "gguf-py")]
    try:
        from conversion.base import TextModel  # type: ignore[import-not-found]

        known = TextModel.get_vocab_base_pre
    except (ImportError, AttributeError):  # an older or newer one: as it is
        pass
    else:

        def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
            try:
                return str(known(self, tokenizer))
            except NotImplementedError:
                file = Path(self.dir_model) / "tokenizer.json"
                name = name_of_pre_tokenizer(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
                if name is None:
                    raise
                return name

        TextModel.get_vocab_base_pre = get_vocab_base_pre
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    _main()
