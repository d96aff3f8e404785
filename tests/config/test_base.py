"""Options: what is taken, what is refused, and that a config survives its file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qosora.config import QosoraConfig
from qosora.errors import ConfigError


class TestQosoraConfig:
    def test_defaults_are_the_methods(self):
        config = QosoraConfig()
        assert (config.rank, config.quant_type, config.blocksize, config.double_quant) == (128, "nf4", 64, True)
        assert config.torch_compute_dtype is None

    @pytest.mark.parametrize("given", ["bfloat16", "torch.bfloat16", torch.bfloat16])
    def test_compute_dtype_by_name_or_dtype(self, given: Any):
        config = QosoraConfig(compute_dtype=given)
        assert config.compute_dtype == "bfloat16"
        assert config.torch_compute_dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
            ({"rank": 8.0}, "rank must be"),
            ({"rank": True}, "rank must be"),
            ({"rank": "8"}, "rank must be"),
            ({"svd": "fast"}, "svd must be one of randomized, exact, got 'fast'"),
            ({"svd_iterations": -1}, "svd_iterations must be"),
            ({"svd_oversampling": 1.5}, "svd_oversampling must be"),
            ({"seed": None}, "seed must be"),
            ({"quant_type": "int4"}, "quant_type must be one of nf4, fp4"),
            ({"blocksize": 48}, "blocksize must be one of"),
            ({"blocksize": 64.0}, "blocksize must be one of"),
            ({"double_quant": 1}, "double_quant must be one of True, False"),
            ({"compute_dtype": "float64"}, "compute_dtype must be one of"),
            ({"compute_dtype": torch.int8}, "compute_dtype must be one of"),
            ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names"),
            ({"modules_to_not_convert": ["(", 3]}, "modules_to_not_convert: '\\(' is not a regular expression"),
            ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a dict from names to ranks, got \\['q_proj'\\]"),
            ({"rank_pattern": {"q_proj": 0}}, "rank_pattern\\['q_proj'\\] must be an integer of at least 1"),
            ({"rank_pattern": {"q_proj[": 4}}, "rank_pattern\\['q_proj\\['\\] is not a regular expression"),
            ({"rank_pattern": {3: 4}}, "rank_pattern\\[3\\] is not a name"),
            ({"quant_method": "gptq"}, "quant_method must be 'qosora', got 'gptq'"),
            ({"bits": 4}, "unknown option 'bits'; the options are rank, rank_pattern, svd"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str):
        with pytest.raises(ConfigError, match=message):
            QosoraConfig(**options)

    def test_reports_all_problems_at_once(self):
        with pytest.raises(ConfigError) as caught:
            QosoraConfig(rank=-1, svd="x", blocksize=3, rank_pattern={"a": "b"}, bits=4, lora_alpha=1)  # type: ignore[dict-item]
        assert len(caught.value.problems) == 6
        assert str(caught.value).startswith("6 problems:\n- ")

    def test_an_error_is_a_value_error(self):
        with pytest.raises(ValueError, match="rank must be"):
            QosoraConfig(rank=0)

    def test_survives_json(self):
        config = QosoraConfig(
            rank=4, rank_pattern={"q_proj": 2}, svd="exact", modules_to_not_convert=["k_proj"],
            compute_dtype=torch.float16, quant_type="fp4", blocksize=128, double_quant=False, seed=3,
        )  # fmt: skip
        again = QosoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again.to_dict() == config.to_dict()

    def test_does_not_hold_the_callers_dict(self):
        ranks = {"q_proj": 4}
        config = QosoraConfig(rank_pattern=ranks)
        ranks["k_proj"] = 8
        assert config.rank_pattern == {"q_proj": 4}

    @pytest.mark.parametrize(
        ("pattern", "name", "matches"),
        [
            ("q_proj", "model.layers.0.self_attn.q_proj", True),
            ("q_proj", "q_proj", True),
            ("proj", "model.layers.0.self_attn.q_proj", False),
            ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
            ("[qk]_proj", "model.layers.0.self_attn.k_proj", True),
            ("q|k", "model.q", True),
            ("model.layers.0", "model.layers.0.self_attn.q_proj", False),
            (r"layers\.[01]\..*", "model.layers.1.mlp.up_proj", True),
            (r"layers\.1\..*", "model.layers.11.mlp.up_proj", False),
        ],
    )
    def test_rank_pattern_means(self, pattern: str, name: str, matches: bool):
        assert QosoraConfig(rank=4, rank_pattern={pattern: 2}).rank_of(name) == (2 if matches else 4)

    def test_longest_pattern_counts_whatever_the_order(self):
        """config.json sorts its keys, so the order in which a user gave them is gone after a save."""
        ranks = {r"layers\.0\.self_attn\.q_proj": 2, ".*proj": 3, "q_proj": 5, "k_proj": 6}
        for pairs in (ranks.items(), reversed(ranks.items()), sorted(ranks.items())):
            config = QosoraConfig(rank=9, rank_pattern=dict(pairs))
            assert config.rank_of("model.layers.0.self_attn.q_proj") == 2
            assert config.rank_of("model.layers.1.self_attn.v_proj") == 3
            assert config.rank_of("lm_head") == 9
            assert config.rank_of("model.layers.1.self_attn.k_proj") in (3, 6)  # two of one length
        assert (
            len({QosoraConfig(rank_pattern=dict(p)).rank_of("k_proj") for p in (ranks.items(), sorted(ranks.items()))})
            == 1
        )
