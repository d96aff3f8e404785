"""Quantized OSoRA: fine-tune large language models with frozen 4-bit SVD factors and two float32 vectors per layer.

`import qosora` costs nothing: names load what they need on first use (PEP 562). It tells transformers and PEFT of the
"qosora" quantization and the "OSORA" adapter, whether they are imported before it or after.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from qosora import _plugin

if TYPE_CHECKING:
    from qosora.adapter import OsoraLayer as OsoraLayer
    from qosora.adapter import OsoraModel as OsoraModel
    from qosora.config import OsoraConfig as OsoraConfig
    from qosora.config import QosoraConfig as QosoraConfig
    from qosora.convert import quantize as quantize
    from qosora.errors import QosoraError as QosoraError
    from qosora.evaluation import evaluate as evaluate
    from qosora.export import export_lora as export_lora
    from qosora.export import export_merged as export_merged
    from qosora.generation import generate as generate
    from qosora.linear import QosoraLinear as QosoraLinear
    from qosora.memory.plan import plan as plan
    from qosora.memory.profile import profile as profile
    from qosora.models import load_base as load_base
    from qosora.models import load_model as load_model
    from qosora.models import load_tokenizer as load_tokenizer
    from qosora.optim import PackedPagedOptimizer as PackedPagedOptimizer
    from qosora.run_config import TrainConfig as TrainConfig
    from qosora.tiling import apply_tiling as apply_tiling
    from qosora.training import train as train

__version__ = "0.1.0"

_EXPORTS = {
    "OsoraConfig": "config",
    "OsoraLayer": "adapter",
    "OsoraModel": "adapter",
    "PackedPagedOptimizer": "optim",
    "QosoraConfig": "config",
    "QosoraError": "errors",
    "QosoraLinear": "linear",
    "TrainConfig": "run_config",
    "apply_tiling": "tiling",
    "evaluate": "evaluation",
    "export_lora": "export",
    "export_merged": "export",
    "generate": "generation",
    "load_base": "models",
    "load_model": "models",
    "load_tokenizer": "models",
    "plan": "memory.plan",
    "profile": "memory.profile",
    "quantize": "convert",
    "train": "training",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qosora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qosora.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


# On a CPU with AVX512-BF16, importing bitsandbytes warns that an optional package is missing, one we would not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
_plugin.install()
