"""Options: what is taken, what is refused, and that a config survives its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from qosora.config import OsoraConfig
from qosora.errors import ConfigError


class TestOsoraConfig:
    def test_defaults(self):
        config = OsoraConfig()
        assert (config.vectors, config.task_type, config.target_modules) == ("both", "CAUSAL_LM", None)
        assert config.peft_type == "OSORA"
        assert config.peft_type.value == "OSORA"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vectors": "u"}, "vectors must be one of both, s, o, got 'u'"),
            ({"target_modules": "q_proj["}, "target_modules 'q_proj\\[' is not a regular expression"),
            ({"target_modules": 3}, "target_modules must be a list of names or a regular expression, got 3"),
            ({"exclude_modules": "("}, "exclude_modules '\\(' is not a regular expression"),
            ({"exclude_modules": ["a", 1]}, "exclude_modules must be a list"),
            ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
            ({"layers_to_transform": "0"}, "layers_to_transform must be an index or a list of them"),
            ({"layers_to_transform": [0, -1]}, "layers_to_transform must be an index or a list of them"),
            ({"layers_pattern": "layers"}, "give both or neither"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str):
        with pytest.raises(ConfigError, match=message):
            OsoraConfig(**options)

    def test_reports_all_problems_at_once(self):
        with pytest.raises(ConfigError) as caught:
            OsoraConfig(vectors="x", target_modules="(", modules_to_save="lm_head", layers_pattern="h")  # type: ignore[arg-type]
        assert len(caught.value.problems) == 4

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'lora_alpha'"):
            OsoraConfig(lora_alpha=16)

    def test_file_is_the_same_whatever_the_order(self, tmp_path: Path):
        for name, modules in (("a", ["q_proj", "k_proj", "up_proj"]), ("b", ["up_proj", "k_proj", "q_proj"])):
            OsoraConfig(target_modules=modules).save_pretrained(str(tmp_path / name))
        files = [(tmp_path / name / "adapter_config.json").read_bytes() for name in "ab"]
        assert files[0] == files[1]

    def test_survives_its_file(self, tmp_path: Path):
        config = OsoraConfig(
            vectors="s", target_modules=["q_proj"], layers_to_transform=[1], modules_to_save=["lm_head"],
            base_fingerprint="0123456789abcdef", base_model_name_or_path="base",
        )  # fmt: skip
        config.save_pretrained(str(tmp_path))
        again = PeftConfig.from_pretrained(str(tmp_path))
        assert isinstance(again, OsoraConfig)
        assert again == config
