"""Answers before a run and after it: from the data it was evaluated on, by what it began with and what it became."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_checkpoint, sums, write_jsonl

from qosora import QosoraConfig, TrainConfig, generate, load_model, load_tokenizer, train
from qosora.errors import ConfigError
from qosora.training.answers import answers_of
from qosora.training.report import report

CHAT = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    make_base(folder / "base", make_checkpoint(folder / "source", "llama-text"), QosoraConfig(rank=8))
    write_jsonl(folder / "train.jsonl", sums(8))
    write_jsonl(folder / "test.jsonl", sums(4, 24))
    run(folder, "first", eval_data=str(folder / "test.jsonl"))
    return folder


def run(folder: Path, name: str, **more: Any) -> None:
    more = {"model": str(folder / "base"), "data": str(folder / "train.jsonl"), "learning_rate": 0.1, **more}
    train(TrainConfig(output_dir=str(folder / name), max_steps=3, progress=False, **more))


def written(folder: Path, name: str, prompts: list[str]) -> list[str]:
    return generate(load_model(folder / name), load_tokenizer(folder / "base"), prompts, max_new_tokens=8)


def test_of_held_out_prompts(folder: Path):
    rows = sums(4, 24)[:2]
    found = answers_of(folder / "first", 2, max_new_tokens=8)
    prompts = [row["prompt"] for row in rows]
    assert [answer.prompt for answer in found] == prompts
    assert [answer.expected for answer in found] == [row["completion"] for row in rows]
    assert [answer.before for answer in found] == written(folder, "base", prompts)
    assert [answer.after for answer in found] == written(folder, "first", prompts)
    assert found[0].before != found[0].after


def test_before_is_what_a_run_began_with(folder: Path):
    run(folder, "second", model=str(folder / "first"))
    (found,) = answers_of(folder / "second", 1, max_new_tokens=8)  # of the training data: there are no others
    prompt = sums(1)[0]["prompt"]
    assert [found.prompt, found.before] == [prompt, *written(folder, "first", [prompt])]
    assert found.after == written(folder, "second", [prompt])[0]


@pytest.mark.parametrize(
    ("row", "method", "prompt", "expected"),
    [
        ({"messages": CHAT}, "sft", "1 + 1 =", "2"),
        ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, "dpo", "1 + 1 =", " 2"),
        ({"prompt": "1 + 1 =", "completion": " 2", "label": True}, "kto", "1 + 1 =", " 2"),
        ({"prompt": "1 + 1 =", "completion": " 3", "label": False}, "kto", "1 + 1 =", None),
        ({"prompt": "1 + 1 =", "answer": "2"}, "grpo", "1 + 1 =", None),
    ],
)  # fmt: skip
def test_every_form_of_data(folder: Path, row: dict[str, Any], method: str, prompt: str, expected: str | None):
    """A finished run whose data are exchanged: the configuration says where they are."""
    file = folder / f"{method}.jsonl"
    file.write_text(json.dumps(row) + "\n")
    config = folder / "first" / "train_config.yaml"
    before = config.read_text()
    changed = TrainConfig(
        model=str(folder / "base"), data=str(file), output_dir=str(folder / "first"), method=method,
        reward=["exact"] if method == "grpo" else [],
    )  # fmt: skip
    changed.save(config)
    template = folder / "first" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    try:
        (found,) = answers_of(folder / "first", 1, max_new_tokens=1)
        assert (found.prompt, found.expected) == (prompt, expected)
    finally:
        config.write_text(before)
        template.unlink()


def test_in_the_report(folder: Path):
    where = report([folder / "first"], folder / "report.html", answers=2)
    text = where.read_text()
    assert "<h2>Answers of first</h2>" in text
    for answer in answers_of(folder / "first", 2):
        assert f"<td>{answer.prompt}</td><td>{answer.expected}</td>" in text


def test_plain_text_has_no_prompts(folder: Path):
    (folder / "text.jsonl").write_text('{"text": "1 + 1 = 2"}\n' * 4)
    run(folder, "plain", data=str(folder / "text.jsonl"))
    with pytest.raises(ConfigError, match=r"answers need prompts, but .*text.jsonl is plain text"):
        report([folder / "plain"], folder / "report.html", answers=1)
