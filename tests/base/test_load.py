"""Loading for the command line: everything that can be wrong with a folder is one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import load, logits, make_base, make_checkpoint, make_tokenizer, train

from qosora.base.load import load_base, load_model, load_tokenizer
from qosora.checkpoints.stored_config import load_config
from qosora.config import OsoraConfig
from qosora.errors import CheckpointError, FingerprintError
from qosora.layers.linear import qosora_modules


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With source (ordinary), base, adapter, and a base of another model."""
    place = tmp_path_factory.mktemp("models")
    make_base(place / "base", dtype=torch.bfloat16)
    (place / "base-source").rename(place / "source")
    model = get_peft_model(load(place / "base"), OsoraConfig())
    train(model, steps=1)
    model.save_pretrained(place / "adapter")
    make_base(place / "other", seed=1)
    return place


@pytest.fixture
def copies(place: Path, tmp_path: Path) -> Path:
    """Base and adapter to damage; the adapter still names the undamaged base."""
    for name in ("base", "adapter"):
        shutil.copytree(place / name, tmp_path / name)
    return tmp_path


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


class TestBase:
    def test_loads_in_the_checkpoints_dtype_or_another(self, place: Path):
        assert load_base(place / "base").dtype == torch.bfloat16
        assert load_base(str(place / "base"), dtype=torch.float32).dtype == torch.float32
        assert len(qosora_modules(load_base(place / "base", dtype="float32", device_map="cpu"))) == 14

    @pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
    def test_with_a_configuration_that_was_read_already(self, place: Path, dtype: Any):
        config = load_config(place / "base")
        before = config.to_dict()
        found, expected = load_base(place / "base", config=config, dtype=dtype), load(place / "base", dtype=dtype)
        assert config.to_dict() == before
        assert found.config.to_dict() == expected.config.to_dict()
        assert found.name_or_path == expected.name_or_path == str(place / "base")
        assert {n: (p.dtype, p.requires_grad) for n, p in found.named_parameters()} == {
            n: (p.dtype, p.requires_grad) for n, p in expected.named_parameters()
        }
        assert torch.equal(logits(found), logits(expected))

    def test_values_for_the_configuration(self, place: Path):
        assert load_base(place / "base", max_position_embeddings=7).config.max_position_embeddings == 7
        assert load_base(place / "base", attn_implementation="eager").config._attn_implementation == "eager"

    def test_an_ordinary_checkpoint(self, place: Path):
        with pytest.raises(
            CheckpointError, match=r"source is an ordinary checkpoint, not a qosora base\. .*quantize SRC"
        ):
            load_base(place / "source")

    def test_another_quantization(self, copies: Path):
        config = json.loads((copies / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (copies / "base" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="is quantized with 'gptq', not a qosora base"):
            load_base(copies / "base")

    @pytest.mark.parametrize(
        "damage", ["no folder", "no config", "broken config", "no weights", "cut weights", "shapes"]
    )
    def test_damaged(self, copies: Path, damage: str):
        base = copies / "base"
        weights = base / "model.safetensors"
        if damage == "no folder":
            shutil.rmtree(base)
        elif damage == "no config":
            (base / "config.json").unlink()
        elif damage == "broken config":
            truncate(base / "config.json")
        elif damage == "no weights":
            weights.unlink()
        elif damage == "cut weights":
            truncate(weights)
        else:
            tensors = load_file(weights)
            tensors["model.layers.0.mlp.up_proj.s"] = torch.ones(3)
            save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=str(base)) as caught:
            load_base(base)
        assert "\n" not in str(caught.value)


class TestAdapter:
    def test_loads(self, place: Path):
        expected = logits(PeftModel.from_pretrained(load(place / "base"), place / "adapter"))
        for base in (None, place / "base"):
            model = load_model(place / "adapter", base=base, dtype=torch.bfloat16)  # also on a CPU that is slow in it
            assert isinstance(model, PeftModel)
            assert not model.training
            assert torch.equal(logits(model), expected)
        assert not isinstance(load_model(place / "base"), PeftModel)

    def test_names_no_base(self, copies: Path):
        file = copies / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
        with pytest.raises(CheckpointError, match="names no base; give it with --base"):
            load_model(copies / "adapter")
        assert isinstance(load_model(copies / "adapter", base=copies / "base"), PeftModel)

    @pytest.mark.parametrize("recorded", ["gone", "source"])
    def test_names_what_is_no_base(self, place: Path, copies: Path, recorded: str):
        """As where it was trained on a base that was decomposed while loading and never saved."""
        file = copies / "adapter" / "adapter_config.json"
        changed = {**json.loads(file.read_text()), "base_model_name_or_path": str(place / recorded)}
        file.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=rf"{recorded} is the base that .* names; if it has moved"):
            load_model(copies / "adapter")

    def test_another_base(self, place: Path):
        with pytest.raises(FingerprintError, match="but this base has"):
            load_model(place / "adapter", base=place / "other")

    @pytest.mark.parametrize("damage", ["broken config", "no weights", "cut weights", "missing tensor"])
    def test_damaged(self, copies: Path, damage: str):
        adapter = copies / "adapter"
        weights = adapter / "adapter_model.safetensors"
        if damage == "broken config":
            truncate(adapter / "adapter_config.json")
        elif damage == "no weights":
            weights.unlink()
        elif damage == "cut weights":
            truncate(weights)
        else:
            tensors = load_file(weights)
            tensors.pop(next(iter(tensors)))
            save_file(tensors, weights)
        with pytest.raises(CheckpointError, match=str(adapter)) as caught:
            load_model(adapter)
        assert "\n" not in str(caught.value)


class TestTokenizer:
    def test_first_that_has_one(self, place: Path, tmp_path: Path):
        make_tokenizer().save_pretrained(tmp_path)
        assert load_tokenizer(None, place / "adapter", tmp_path).bos_token == "<s>"

    @pytest.mark.parametrize("sources", [(), (None,), ("base", "adapter")], ids=str)
    def test_none(self, place: Path, sources: Any):
        with pytest.raises(CheckpointError, match="no tokenizer found"):
            load_tokenizer(*(source and place / source for source in sources))


def test_a_plain_checkpoint_stays_untouched_by_qosora(tmp_path: Path):
    """Importing qosora changes nothing for other models."""
    model = load(make_checkpoint(tmp_path))
    assert not qosora_modules(model)
    assert not hasattr(model.config, "quantization_config")


class TestOnACPUThatIsSlowIn16Bits:
    @pytest.fixture
    def half(self, tmp_path: Path) -> Path:
        return make_base(tmp_path / "base", dtype=torch.bfloat16)

    @pytest.mark.parametrize(
        ("times", "options", "expected"),
        [
            (60.0, {}, torch.float32),
            (60.0, {"dtype": torch.bfloat16}, torch.bfloat16),
            (0.5, {}, torch.bfloat16),
        ],
    )
    def test_inference_is_in_float32(
        self,
        half: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        times: float,
        options: dict[str, Any],
        expected: torch.dtype,
    ):
        monkeypatch.setattr("qosora.layers.precision.slowdown", lambda _: times)
        with caplog.at_level("INFO", "qosora"):
            model = load_model(half, device_map="cpu", **options)
        assert model.dtype == expected
        assert ("computing in float32, as this CPU is slow in bfloat16" in caplog.text) == (expected == torch.float32)

    def test_what_is_asked_for_in_training_stays(self, half: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("qosora.layers.precision.slowdown", lambda _: 60.0)
        assert load_base(half, device_map="cpu").dtype == torch.bfloat16
