"""Files are named as the libraries that write and read them name theirs."""

from __future__ import annotations

from pathlib import Path

from peft.utils import constants as of_peft
from tiny import make_base, make_trained
from transformers import utils as of_transformers

from qosora.checkpoints import names


def test_a_models_files_are_named_as_transformers_names_them() -> None:
    assert names.CONFIG_NAME == of_transformers.CONFIG_NAME
    assert names.SINGLE_NAME == of_transformers.SAFE_WEIGHTS_NAME
    assert names.INDEX_NAME == of_transformers.SAFE_WEIGHTS_INDEX_NAME


def test_an_adapters_files_are_named_as_peft_names_them() -> None:
    assert names.ADAPTER_CONFIG == of_peft.CONFIG_NAME == of_transformers.ADAPTER_CONFIG_NAME
    assert f"{names.ADAPTER_STEM}.safetensors" == of_peft.SAFETENSORS_WEIGHTS_NAME


def test_these_are_the_files_that_are_there(tmp_path: Path) -> None:
    trained = make_trained(tmp_path, "llama")
    assert {file.name for file in trained.base.iterdir()} == {
        names.CONFIG_NAME, names.SINGLE_NAME, names.MANIFEST_NAME, "generation_config.json",
    }  # fmt: skip
    assert {names.ADAPTER_CONFIG, f"{names.ADAPTER_STEM}.safetensors"} < {f.name for f in trained.adapter.iterdir()}
    sharded = make_base(tmp_path / "sharded", trained.original, max_shard_size="20KB")
    assert (sharded / names.INDEX_NAME).is_file()
    assert not (sharded / names.SINGLE_NAME).exists()
