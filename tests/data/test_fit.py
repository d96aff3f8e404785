"""Tokens that a model has no embedding for, and texts that are longer than it has positions."""

from __future__ import annotations

import pytest
from tiny import make_model
from transformers import LlamaConfig, T5Config, XLNetConfig

from qosora.data.fit import embedding_rows, learned_positions, most_positions, refuse_foreign_tokens, refuse_too_long
from qosora.errors import DataError


def test_foreign_tokens():
    refuse_foreign_tokens([[0, 9], []], 10, "here")
    with pytest.raises(
        DataError, match="gives token 10, but the model's vocabulary has 10: the tokenizer files in here"
    ):
        refuse_foreign_tokens([[0, 9], [10]], 10, "here")


def test_positions():
    refuse_too_long(8, 8, "cut it")
    refuse_too_long(8, None, "cut it")
    with pytest.raises(DataError, match="a text has 9 tokens, but the model takes 8; cut it"):
        refuse_too_long(9, 8, "cut it")


@pytest.mark.parametrize(("family", "positions"), [("llama", None), ("gpt2", 64), ("gemma3", None)])
def test_who_learned_positions(family: str, positions: int | None):
    model = make_model(family)
    assert learned_positions(model) == positions
    assert embedding_rows(model) == model.config.vocab_size


def test_the_most_positions():
    assert most_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert most_positions(XLNetConfig()) is None  # it says -1
    assert most_positions(T5Config()) is None
