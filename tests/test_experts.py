"""Experts become layers of their own, compute what transformers' stacked ones do, and are named as on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_bases import (
    FAMILIES,
    LAYERS,
    MIXTURES,
    assert_same_tensors,
    decompose,
    load,
    logits,
    make_base,
    make_checkpoint,
    token_ids,
    train,
)
from torch import nn
from torch.func import functional_call
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Step3p7TextConfig,
    SwitchTransformersConfig,
)

from qosora.adapter import OsoraLayer
from qosora.checkpoint import CheckpointReader
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError
from qosora.experts import LinearExperts, router_names, split_experts, stack_experts, stacked_names
from qosora.export import export_merged
from qosora.linear import QosoraLinear, qosora_modules
