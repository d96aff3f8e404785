"""Cut a model's vocabulary to the tokens that some texts need: a large vocabulary costs a CPU most of a small model.

A byte-pair encoder merges, again and again, the adjacent pair of lowest rank. Take the pairs that it merges on the way
to the tokens of some texts, drop every other pair, and it walks the same way: at each step the pair it chose is still
there, and still the lowest. So the tokenizer made here gives those texts the same tokens, which `cut_tokenizer` checks,
and spells anything else in smaller pieces, down to bytes.

The model keeps the rows of its embedding (and of the output embedding) that belong to these tokens. Its logits for
them are as they were; the probability it gave to other tokens is spread over them, so losses are lower than with the
whole vocabulary.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

#: Kept whatever the texts: bytes that spell any text, and what marks the parts of a text.
_ALWAYS = re.compile(r"<0x[0-9A-F]{2}>|<(pad|eos|bos|unk|mask|start_of_turn|end_of_turn)>")


def cut_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[PreTrainedTokenizerBase, torch.Tensor]:
    """Return a tokenizer that has the tokens of some texts alone, and the old ids of its tokens in order.

    Args:
        tokenizer: Byte-pair encoding with byte fallback, as Gemma's and Llama 2's.
        texts: Get the same tokens from the new tokenizer.

    Raises:
        ValueError: The tokenizer is of another kind, or the texts got other tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        spec = json.loads(file.read_text(encoding="utf-8"))
        if spec["model"]["type"] != "BPE" or not spec["model"]["byte_fallback"]:
            raise ValueError("only byte-pair encoders with byte fallback can be cut")
        old = tokenizer(list(texts))["input_ids"]
        kept = _cut(spec, {i for ids in old for i in ids})
        file.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        small = AutoTokenizer.from_pretrained(folder)
    for text, before, after in zip(texts, old, small(list(texts))["input_ids"], strict=True):
        if [kept[i] for i in after] != before:
            raise ValueError(f"the cut tokenizer spells a text otherwise: {text[:80]!r}")
    return small, torch.tensor(kept)


def cut_model(model: PreTrainedModel, kept: torch.Tensor) -> None:
    """Keep some rows of a model's embedding and output embedding, in place. kept: (tokens,), old ids."""
    tied = model.config.tie_word_embeddings
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        layer.weight = torch.nn.Parameter(layer.weight.detach()[kept].clone(), requires_grad=False)
        setattr(layer, "num_embeddings" if hasattr(layer, "num_embeddings") else "out_features", len(kept))
    model.config.vocab_size = model.vocab_size = len(kept)
    if tied:
        model.tie_weights()


def _cut(spec: dict[str, Any], used: Iterable[int]) -> list[int]:
    """Cut the contents of a tokenizer.json, in place; return the old ids of the tokens that stay, in order."""
    model, added = spec["model"], {t["content"]: t["id"] for t in spec["added_tokens"]}
    ids: dict[str, int] = {**model["vocab"], **added}
    names = {i: name for name, i in ids.items()}
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    tokens = {names[i] for i in used} | {name for name in ids if _ALWAYS.fullmatch(name)}
    merges: set[tuple[str, str]] = set()
    for token in tokens - added.keys():
        merges |= _merges(token, ranks)
    tokens |= {part for a, b in merges for part in (a, b, a + b)}
    kept = sorted(ids[token] for token in tokens)
    new = {names[old]: i for i, old in enumerate(kept)}
    model["vocab"] = {name: i for name, i in new.items() if name in model["vocab"]}
    model["merges"] = [list(pair) for pair in sorted(merges, key=ranks.__getitem__)]
    spec["added_tokens"] = [t | {"id": new[t["content"]]} for t in spec["added_tokens"] if t["content"] in new]
    for special in (spec["post_processor"] or {}).get("special_tokens", {}).values():
        special["ids"] = [new[token] for token in special["tokens"]]
    return kept


def _merges(token: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """Return the pairs that are merged on the way from a token's characters to the token."""
    parts, merged = list(token), set()
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):  # a token that no merges lead to, such as a byte
            return set()
        merged.add((parts[at], parts[at + 1]))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return merged
