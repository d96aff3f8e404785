"""What is relied on of PEFT beside that names exist; `test_adapter` has the rest."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from transformers import LlamaForCausalLM

import qosora.export.outsider
from qosora.compat import peft as hidden
from qosora.config import OsoraConfig


@pytest.mark.parametrize(
    ("options", "name", "targeted"),
    [
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj", True),
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.k_proj", False),
        ({"target_modules": r".*\.[qk]_proj"}, "model.layers.0.self_attn.k_proj", True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj", False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "model.layers.0.self_attn.q_proj", False),
    ],
)
@pytest.mark.parametrize("kind", [LoraConfig, OsoraConfig])
def test_which_modules_a_config_targets(kind: type, options: dict[str, object], name: str, targeted: bool):
    assert bool(hidden.check_target_module_exists(kind(**options), name)) == targeted


def test_an_adapter_that_is_not_whole_is_warned_of(tmp_path: Path):
    base = make_checkpoint(tmp_path / "base", "llama")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.warns(UserWarning, match=f"^{hidden.missing_keys_warning()}"):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora")


def test_the_program_that_must_not_import_qosora_matches_the_same_text():
    tree = ast.parse(Path(qosora.export.outsider.__file__).read_text(encoding="utf-8"))
    assert hidden.missing_keys_warning() in [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]


def test_a_lora_of_experts_becomes_one_of_stacks(tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = make_checkpoint(tmp_path, "mixtral")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    config = LoraConfig(target_modules=["w1", "w2", "w3"])
    hidden.convert_peft_config_for_transformers(config, model, None)
    assert config.target_parameters


def test_an_adapter_that_is_merged_already_is_not_merged_again():
    with torch.device("meta"):
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    lora = get_peft_model(layer, LoraConfig(r=1, target_modules=["0"])).base_model.model[0]
    assert hidden.check_adapters_to_merge(lora, None) == ["default"]
    lora.merged_adapters.append("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert hidden.check_adapters_to_merge(lora, None) == []


def test_a_model_that_is_marked_gets_loras_layers_of_4_bits():
    import bitsandbytes

    hidden.load_bnb_layers()
    from peft.tuners.lora.bnb import Linear4bit

    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(8, 8))
    hidden.mark_as_4bit(model)
    assert isinstance(get_peft_model(model, LoraConfig(r=1, target_modules=["0"])).base_model.model[0], Linear4bit)


@pytest.mark.slow
def test_layers_for_bitsandbytes_come_with_their_import():
    code = (
        "from qosora.compat.peft import load_bnb_layers; load_bnb_layers(); import sys; "
        "print('peft.tuners.lora.bnb' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
