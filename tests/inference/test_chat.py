"""Conversations: what the model is given, and that each speaker is who it is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_base, make_checkpoint, perturbed

from qosora.base.load import load_base, load_model, load_tokenizer
from qosora.config import QosoraConfig
from qosora.errors import ConfigError, FingerprintError
from qosora.inference.chat import BASE, Chat
from qosora.inference.generation import generate

OPTIONS: dict[str, Any] = {"max_new_tokens": 8}
ASKED = [{"role": "user", "content": "1+1="}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of it that answer otherwise."""
    folder = tmp_path_factory.mktemp("chat")
    make_base(folder / "base", make_checkpoint(folder / "llama", "llama-text"), QosoraConfig(rank=8))
    for seed, name in ((1, "one"), (2, "two.5")):
        perturbed(load_base(folder / "base"), seed=seed).save_pretrained(folder / name)
    return folder


@pytest.fixture
def chat(folder: Path) -> Chat:
    return Chat(load_model(folder / "one"), load_tokenizer(folder / "base"), name="one", **OPTIONS)


def said_by(source: Path, folder: Path, messages: list[dict[str, str]]) -> str:
    return generate(load_model(source), load_tokenizer(folder / "base"), [messages], **OPTIONS)[0]


def test_turns_are_remembered_and_pieces_make_the_answer(chat: Chat, folder: Path):
    pieces: list[str] = []
    first = chat.answer("1+1=", pieces.append)
    assert "".join(pieces) == first == said_by(folder / "one", folder, ASKED)
    second = chat.answer("2+2=")
    whole = [*ASKED, {"role": "assistant", "content": first}, {"role": "user", "content": "2+2="}]
    assert second == said_by(folder / "one", folder, whole)
    assert chat.messages == [*whole, {"role": "assistant", "content": second}]
    chat.begin("Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_each_speaker_is_who_it_is_said_to_be(chat: Chat, folder: Path):
    assert chat.add(folder / "two.5") == "two.5"
    assert chat.speakers == [BASE, "one", "two.5"]
    assert chat.speaker == "one"
    expected = {
        name: said_by(folder / source, folder, ASKED)
        for name, source in ((BASE, "base"), ("one", "one"), ("two.5", "two.5"))
    }
    assert len(set(expected.values())) == 3
    assert chat.compare("1+1=") == expected
    assert chat.messages == []
    for name in (BASE, "two.5", "one", BASE):
        chat.use(name)
        chat.begin()
        assert chat.answer("1+1=") == expected[name]


def test_a_base_takes_its_first_adapter(folder: Path):
    chat = Chat(load_model(folder / "base"), load_tokenizer(folder / "base"), **OPTIONS)
    assert (chat.speaker, chat.speakers) == (BASE, [BASE])
    assert chat.add(folder / "one") == "one"
    assert chat.add(folder / "one") == "one'"
    assert chat.compare("1+1=")["one"] == chat.compare("1+1=")["one'"] == said_by(folder / "one", folder, ASKED)


def test_who_is_not_there_is_told(chat: Chat):
    with pytest.raises(ConfigError, match=r"there is no 'onne'; did you mean 'one'\?"):
        chat.use("onne")
    assert chat.speaker == "one"


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(chat: Chat, folder: Path, tmp_path: Path):
    source = make_checkpoint(tmp_path / "llama", "llama-text", seed=3)
    other = make_base(tmp_path / "base", source, QosoraConfig(rank=8))
    perturbed(load_base(other)).save_pretrained(tmp_path / "other")
    before = chat.compare("1+1=")
    with pytest.raises(FingerprintError):
        chat.add(tmp_path / "other")
    assert chat.compare("1+1=") == before


def test_the_model_is_left_as_it_was(chat: Chat):
    before = {name: p.clone() for name, p in chat.model.named_parameters()}
    chat.compare("1+1=")
    after: dict[str, Any] = dict(chat.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
