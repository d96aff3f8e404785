"""TrainConfig: defaults, YAML and flags, types, and all problems at once with their place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qosora.errors import ConfigError
from qosora.training.config import TrainConfig

NEEDED: dict[str, Any] = {"model": "base", "data": "train.jsonl", "output_dir": "run"}


def problems_of(yaml_path: Path | None = None, **overrides: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(yaml_path, overrides)
    return caught.value.problems


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: base\ndata: a.jsonl\noutput_dir: run\nepochs: 2\nlearning_rate: 2e-3\n")
    config = TrainConfig.load(file, {"data": "b.jsonl", "epochs": 3})
    assert (config.model, config.data, config.epochs, config.learning_rate) == ("base", "b.jsonl", 3.0, 2e-3)
    assert config.batch_size == TrainConfig(**NEEDED).batch_size


def test_round_trip_through_yaml(tmp_path: Path):
    config = TrainConfig(**NEEDED, target_modules=["q_proj"], trl={"neftune_noise_alpha": 5}, max_steps=3)
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_all_problems_at_once_with_file_and_line(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: base\nlerning_rate: 1\n\nepochs: many\nbatch_size: 0\nseed: 1\nseed: 2\n")
    found = problems_of(file, schedule="cosin", batch_size=1.5)
    assert f"{file} line 7: seed is given a second time" in found
    assert f"{file} line 2: unknown option 'lerning_rate'; did you mean 'learning_rate'?" in found
    assert f"{file} line 4: epochs must be a number, got 'many'" in found
    assert "batch_size must be an integer, got 1.5" in found  # the flag won, so no line of the file
    assert any(p.startswith("schedule must be one of cosine, linear") for p in found)
    assert any(p.startswith("data is missing") for p in found)
    assert any(p.startswith("output_dir is missing") for p in found)
    assert len(found) == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be below 1, got 1.0"),
        ({"max_steps": True}, "max_steps must be an integer or null, got True"),
        ({"packing": "yes"}, "packing must be true or false, got 'yes'"),
        ({"tile_length": -1}, "tile_length must be at least 0, got -1"),
        ({"tile_length": "long"}, "tile_length must be an integer or null, got 'long'"),
        ({"model": ""}, "model must be non-empty text, got ''"),
        ({"trl": [1]}, "trl must be a mapping of names to values, got [1]"),
        ({"target_modules": [1]}, "target_modules must be a list of texts or null, got [1]"),
        ({"prompt_column": "q"}, "prompt_column and completion_column belong together; give both, or text_column"),
        ({"text_column": "t", "messages_column": "m"}, "messages_column and text_column name different data formats"),
        ({"text_column": "t", "completion_only": True}, "completion_only needs prompts or messages"),
        ({"text_column": "t", "chat": True}, "chat wraps prompts and completions"),
        ({"resume": True, "overwrite": True}, "resume keeps an earlier run and overwrite removes it; give one"),
        ({"eval_steps": 5}, "eval_steps needs eval_data"),
    ],
)
def test_each_problem_is_told(options: dict[str, object], expected: str):
    found = problems_of(None, **{**NEEDED, **options})
    assert len(found) == 1
    assert found[0].startswith(expected)
    with pytest.raises(ConfigError):
        TrainConfig(**{**NEEDED, **options})


def test_harmless_types_are_taken():
    config = TrainConfig(**NEEDED, epochs=2, learning_rate="1e-2", target_modules="q_proj")  # type: ignore[arg-type]
    assert (config.epochs, config.learning_rate, config.target_modules) == (2.0, 0.01, ["q_proj"])
    assert isinstance(config.epochs, float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("max_steps: " + "9" * 6000, "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("- a\n- b\n", "expected lines such as `model: FOLDER`"),
        ("1: 2\n", "expected lines such as `model: FOLDER`"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, expected: str):
    (tmp_path / "c.yaml").write_text(text)
    (problem,) = problems_of(tmp_path / "c.yaml")
    assert expected in problem
    assert str(tmp_path / "c.yaml") in problem


@pytest.mark.parametrize(
    "text", ["model: &a [*a]", "a: &a [x, x]\nmodel: [" + "*a, " * 500 + "]", "model: &a\n  b: *a"]
)
def test_values_without_end_are_shown_short(tmp_path: Path, text: str):
    (tmp_path / "c.yaml").write_text(text)
    problem = next(problem for problem in problems_of(tmp_path / "c.yaml") if "model must be text" in problem)
    assert len(problem) < 200 + len(str(tmp_path))


def test_an_empty_or_missing_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert TrainConfig.load(tmp_path / "c.yaml", NEEDED) == TrainConfig(**NEEDED)
    assert "No such file" in problems_of(tmp_path / "none.yaml")[0]


def test_every_field_has_a_help_text():
    assert all(len(f.metadata["help"]) > 5 for f in fields(TrainConfig))


def test_what_resuming_may_change():
    config = TrainConfig(**NEEDED)
    assert TrainConfig(**NEEDED, save_steps=7, resume=True, report_to=["wandb"]).changed_since(config) == []
    assert TrainConfig(**NEEDED, seed=7, max_steps=3).changed_since(config) == ["max_steps", "seed"]


def test_nothing_heavy_is_imported():
    code = "import qosora.training.config, sys; sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_learning_rate_is_that_of_the_method():
    assert TrainConfig(**NEEDED).learning_rate == 1e-2
    assert TrainConfig(**NEEDED, method="dpo").learning_rate == 1e-3
    assert TrainConfig(**NEEDED, method="dpo", learning_rate=0.5).learning_rate == 0.5
    assert TrainConfig(**NEEDED).changed_since(TrainConfig(**NEEDED, learning_rate=1e-2)) == []


def test_options_of_earlier_versions_are_read(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: base\ndata: a.jsonl\noutput_dir: run\nsft: {adam_epsilon: 1e-6}\n")
    assert TrainConfig.load(file).trl == {"adam_epsilon": "1e-6"}


def test_the_schema_takes_what_the_configuration_takes(tmp_path: Path):
    """And refuses what it refuses, as far as a schema can: types, bounds, choices, names, what is required."""
    schema = TrainConfig.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    needed: dict[str, Any] = {"model": "m", "data": "d", "output_dir": "o"}
    assert validator.is_valid(yaml.safe_load(TrainConfig(**needed).to_yaml()))
    good: dict[str, Any]
    bad: dict[str, Any]
    for good in (
        {"batch_size": "auto"},
        {"reward": "exact", "method": "grpo"},
        {"target_modules": ["a"]},
        {"epochs": 2},
    ):
        assert validator.is_valid({**needed, **good}), good
        TrainConfig(**{**needed, **good})
    for bad in (
        {"batch_size": 0.5}, {"batch_size": "most"}, {"epochs": 0}, {"schedule": "zigzag"}, {"warmup_ratio": 1},
        {"model": ""}, {"model": None}, {"learning_rat": 1e-3}, {"packing": "yes"}, {"reward": [1]}, {"trl": []},
    ):  # fmt: skip
        assert not validator.is_valid({**needed, **bad}), bad
        with pytest.raises(ConfigError):
            TrainConfig.load(None, {**needed, **bad})
    assert not validator.is_valid({"model": "m", "data": "d"})
    assert all(entry["description"] for entry in schema["properties"].values())
