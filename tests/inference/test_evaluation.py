"""Evaluation: the loss that the model itself reports, whatever the batches, and exact match."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_base, make_checkpoint, make_model, make_tokenizer, sums, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
)

import qosora.inference.evaluation
from qosora.data.tokens import IGNORED, Example
from qosora.errors import ConfigError, DataError
from qosora.inference.evaluation import evaluate, mean_loss, perplexity


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama-text")
    return AutoModelForCausalLM.from_pretrained(make_base(tmp_path_factory.mktemp("base"), source))


@pytest.fixture(scope="module")
def gemma2() -> Any:
    """A model that caps its logits, so that the embedding's product alone is not what it says."""
    config = Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1, initializer_range=0.5, pad_token_id=257,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("gemma3"), "gemma3-text"))


def examples(seed: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    found = []
    for length in (3, 9, 4, 30, 17):
        ids = generator.integers(0, 256, length, dtype=np.int32)
        found.append(Example(ids, np.where(np.arange(length) < length // 2, IGNORED, ids)))
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_the_loss_is_the_models_own_per_token(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, seed: int
):
    model, data = request.getfixturevalue(name), examples(seed)
    total = 0.0
    for e in data:
        ids, labels = torch.from_numpy(e.input_ids).long()[None], torch.from_numpy(e.labels).long()[None]
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * e.supervised
    expected = total / sum(e.supervised for e in data)
    # A float32 mean of a few values near 5.5 has an error of some 1e-7 of them.
    assert mean_loss(model, data, batch_size=1) == pytest.approx(expected, rel=2e-6)
    assert mean_loss(model, data, batch_size=4) == pytest.approx(expected, rel=2e-6)
    monkeypatch.setattr(qosora.inference.evaluation, "_LOGITS", 2 * 258)  # two rows of logits at once
    assert mean_loss(model, data, batch_size=4) == pytest.approx(expected, rel=2e-6)
    assert "forward" not in vars(model.base_model)


def test_no_more_logits_than_allowed(llama: Any, monkeypatch: pytest.MonkeyPatch, seed: int):
    rows: list[int] = []
    handle = llama.get_output_embeddings().register_forward_hook(lambda m, i, out: rows.append(out.shape[-2]))
    monkeypatch.setattr(qosora.inference.evaluation, "_LOGITS", 3 * 258)
    mean_loss(llama, examples(seed), batch_size=4)
    handle.remove()
    assert max(rows) == 3
    assert sum(rows) == sum(e.supervised for e in examples(seed))


def test_evaluate_a_file(llama: Any, tmp_path: Path):
    path = write_jsonl(tmp_path / "test.jsonl", sums(6))
    result = evaluate(llama, make_tokenizer(), path)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.examples, result.exact_match, result.samples) == (6, None, [])
    assert result.tokens == sum(len(row["completion"]) + 1 for row in sums(6))
    assert evaluate(llama, make_tokenizer(), path, limit=2).examples == 2
    assert result.to_dict()["loss"] == result.loss


def test_exact_match(llama: Any, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def write(model: Any, tokenizer: Any, prompts: list[Any], **options: Any) -> list[str]:
        asked.extend(prompts)
        return ["0 ", " so 3.\n#### 3", "6"]

    monkeypatch.setattr(qosora.inference.evaluation, "generate", write)
    rows = [*sums(2), {"prompt": "2 + 4 =", "completion": "it is\n#### 7"}]
    result = evaluate(llama, make_tokenizer(), rows, exact_match=True)
    assert asked == [row["prompt"] for row in rows]
    assert [s.match for s in result.samples] == [True, False, False]
    assert result.exact_match == pytest.approx(1 / 3)
    by_number = evaluate(llama, make_tokenizer(), rows, exact_match=True, answer_pattern=r"-?\d+", samples=2)
    assert by_number.exact_match == pytest.approx(2 / 3)
    assert len(by_number.samples) == 2
    by_mark = evaluate(llama, make_tokenizer(), rows, exact_match=True, answer_pattern=r"#### (\d+)")
    assert by_mark.exact_match == 0  # where nothing is found, nothing is equal


def test_exact_match_of_chats(llama: Any):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    result = evaluate(llama, make_tokenizer(), [{"messages": turns}], exact_match=True, max_new_tokens=4)
    assert result.samples[0].prompt == turns[:1]
    assert result.samples[0].expected == "hello"
    with pytest.raises(DataError, match="ends with the assistant"):
        evaluate(llama, make_tokenizer(), [{"messages": turns[::-1]}], exact_match=True)
    with pytest.raises(DataError, match="plain text"):
        evaluate(llama, make_tokenizer(), [{"text": "abc"}], exact_match=True)


def test_what_has_no_text_to_compare_is_told_before_anything_is_generated(llama: Any):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    for last in (call, {**call, "content": None}):
        rows = [{"messages": [{"role": "user", "content": "hi"}, last]}]
        with pytest.raises(DataError, match="example 1: exact match compares texts, and the last message has none"):
            evaluate(llama, make_tokenizer(), rows, exact_match=True)


def test_tokens_and_lengths_that_the_model_does_not_have(llama: Any):
    added = make_tokenizer()
    added.add_tokens(["[NEW]"])
    with pytest.raises(DataError, match="gives token 258, but the model's vocabulary has 258"):
        evaluate(llama, added, [{"text": "a[NEW]"}])
    gpt2 = make_model("gpt2", vocab_size=258, n_positions=16).eval()
    with pytest.raises(DataError, match="a text has 22 tokens, but the model takes 16; set max_length to at most 16"):
        evaluate(gpt2, make_tokenizer(), [{"text": "a" * 20}])
    assert evaluate(gpt2, make_tokenizer(), [{"text": "a" * 20}], max_length=16).tokens == 15


def test_a_broken_pattern(llama: Any):
    with pytest.raises(ConfigError, match="is not a regular expression"):
        evaluate(llama, make_tokenizer(), sums(1), exact_match=True, answer_pattern="(")


def test_a_pattern_that_takes_for_ever_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qosora.inference.evaluation, "_PATIENCE", 0.05)
    with pytest.raises(ConfigError, match=r"'\(a\|aa\)\+\$' takes more than 0.05 s on a text of 61 letters"):
        qosora.inference.evaluation._same("a" * 60 + "!", "x", qosora.inference.evaluation._compiled("(a|aa)+$"))


def test_what_runs_on_no_text_alone_says_so():
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    config = Blip2Config(
        vision_config={**sizes, "intermediate_size": 16},
        qformer_config={**sizes, "intermediate_size": 16, "encoder_hidden_size": 16, "vocab_size": 96},
        text_config={"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "vocab_size": 96,
                     "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        num_query_tokens=2,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    model.config.architectures = ["Blip2ForConditionalGeneration"]
    ids = np.arange(3, 9)
    with pytest.raises(DataError, match=r"Blip2ForConditionalGeneration does not run on text without images .*pixel"):
        mean_loss(model, [Example(ids, ids)])


def test_perplexity_does_not_overflow():
    assert perplexity(1e4) == math.inf
