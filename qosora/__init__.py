"""Quantized OSoRA: fine-tune large language models with frozen 4-bit SVD factors and two float32 vectors per layer.

`import qosora` costs nothing: names load what they need on first use. It tells transformers and PEFT of the "qosora"
quantization and the "OSORA" adapter, whether they are imported before it or after. The packages, in the order in which
a model goes through them:

| package | what happens there |
|---|---|
| `checkpoints` | files come and go: read lazily, written as they come |
| `decompose` | a weight becomes 4-bit factors and a 4-bit residual |
| `layers` | what computes with them: the layer, its product and gradients, mixtures of experts, tiles |
| `base` | a model of such layers: made, stored, loaded |
| `adapter` | PEFT's side: two trainable vectors for each layer |
| `data` | rows become tokens, tokens batches |
| `training` | a base, data and a configuration become an adapter |
| `inference` | text from it, and how good that is |
| `memory` | what a step takes: predicted, measured, drawn |
| `export` | merged weights or a LoRA, for programs that know nothing of qosora |
| `cli` | the command line |

Below all of them: `errors`, `dtypes`, `config` (the two configurations that a user names), `compat` (undocumented names
of other packages, all of them), `register` (entries in other packages' tables). Above: `doctor`, what a machine has.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qosora import register
from qosora._lazy import door
from qosora.compat.bitsandbytes import CPU_LOGGER

if TYPE_CHECKING:
    from qosora.adapter import OsoraLayer as OsoraLayer
    from qosora.adapter import OsoraModel as OsoraModel
    from qosora.base.check import divergence as divergence
    from qosora.base.convert import quantize as quantize
    from qosora.base.describe import describe as describe
    from qosora.base.load import load_base as load_base
    from qosora.base.load import load_model as load_model
    from qosora.base.load import load_tokenizer as load_tokenizer
    from qosora.config import OsoraConfig as OsoraConfig
    from qosora.config import QosoraConfig as QosoraConfig
    from qosora.doctor import diagnose as diagnose
    from qosora.errors import QosoraError as QosoraError
    from qosora.export.gguf import export_gguf as export_gguf
    from qosora.export.lora import export_lora as export_lora
    from qosora.export.merged import export_merged as export_merged
    from qosora.inference.evaluation import evaluate as evaluate
    from qosora.inference.generation import generate as generate
    from qosora.layers.linear import QosoraLinear as QosoraLinear
    from qosora.layers.ops import fused as fused
    from qosora.layers.tiling import apply_tiling as apply_tiling
    from qosora.memory.plan import plan as plan
    from qosora.memory.profile import profile as profile
    from qosora.training.config import TrainConfig as TrainConfig
    from qosora.training.optimizer import PackedPagedOptimizer as PackedPagedOptimizer
    from qosora.training.optimizer import create_optimizer as create_optimizer
    from qosora.training.optimizer import trainer_optimizer as trainer_optimizer
    from qosora.training.run import train as train

__version__ = "0.1.0"

_MODULES = {
    "adapter": ["OsoraLayer", "OsoraModel"],
    "base.check": ["divergence"],
    "base.convert": ["quantize"],
    "base.describe": ["describe"],
    "base.load": ["load_base", "load_model", "load_tokenizer"],
    "config": ["OsoraConfig", "QosoraConfig"],
    "doctor": ["diagnose"],
    "errors": ["QosoraError"],
    "export.gguf": ["export_gguf"],
    "export.lora": ["export_lora"],
    "export.merged": ["export_merged"],
    "inference.evaluation": ["evaluate"],
    "inference.generation": ["generate"],
    "layers.linear": ["QosoraLinear"],
    "layers.ops": ["fused"],
    "layers.tiling": ["apply_tiling"],
    "memory.plan": ["plan"],
    "memory.profile": ["profile"],
    "training.config": ["TrainConfig"],
    "training.optimizer": ["PackedPagedOptimizer", "create_optimizer", "trainer_optimizer"],
    "training.run": ["train"],
}

__all__ = ["__version__", *(name for names in _MODULES.values() for name in names)]

__getattr__, __dir__ = door(__name__, _MODULES)

# On a CPU with AVX512-BF16, importing bitsandbytes warns that an optional package is missing, one we would not use.
logging.getLogger(CPU_LOGGER).setLevel(logging.ERROR)
register.install()
