"""`import qosora` registers the quantizer and the adapter, whatever is imported before it or after."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from peft import get_peft_model
from tiny import load, make_base, train

import qosora
from qosora.config import OsoraConfig


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base and an adapter."""
    folder = tmp_path_factory.mktemp("plugin")
    model = get_peft_model(load(make_base(folder / "base")), OsoraConfig())
    train(model, steps=1)
    model.save_pretrained(folder / "adapter")
    return folder


LOAD = """
def count(model):
    layers = [module for module in model.modules() if type(module).__name__ == "QosoraLinear"]
    print(len(layers), sum("osora_s" in name for name, _ in model.named_parameters()))

model = transformers.AutoModelForCausalLM.from_pretrained("base")
count(model)
model.load_adapter("adapter")  # transformers' own way, which looks up PEFT's tables itself
count(model)
count(peft.AutoPeftModelForCausalLM.from_pretrained("adapter"))
"""
#: A config alone is enough for PEFT, and the modules whose import was hooked look like any other to inspect.
USE_A_CONFIG = """
import inspect
from qosora import OsoraConfig, QosoraConfig
import peft.mapping, transformers.quantizers.auto
model = transformers.AutoModelForCausalLM.from_pretrained("base")
model = peft.get_peft_model(model, OsoraConfig())
model.add_adapter("second", OsoraConfig())
assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["OSORA"] == "osora_"
assert transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qosora"] is QosoraConfig
for module in (peft.mapping, transformers.quantizers.auto):
    assert type(module.__loader__).__name__ == "SourceFileLoader", module.__loader__
    assert module.__spec__.loader is module.__loader__
    assert inspect.getsource(module)
"""


@pytest.mark.parametrize(
    "code",
    [USE_A_CONFIG + "import transformers, peft\n" + LOAD, "import transformers.quantizers.auto, peft, qosora\n" + LOAD],
    ids=["first", "last"],
)
@pytest.mark.slow
def test_loads_whatever_the_order_of_imports(folders: Path, code: str):
    """One process for each order, since importing takes longer than all else."""
    assert run(code, folders).split() == ["14", "0", "14", "14", "14", "14"]


def test_import_costs_nothing(tmp_path: Path):
    code = """
        import sys
        before = set(sys.modules)
        import qosora
        print({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
        assert "QosoraConfig" in dir(qosora)
        try:
            qosora.nonsense
        except AttributeError as error:
            print(error)
    """
    assert run(code, tmp_path).splitlines() == ["{'qosora'}", "module 'qosora' has no attribute 'nonsense'"]


def test_every_export_exists():
    for name in qosora.__all__:
        assert getattr(qosora, name) is not None
