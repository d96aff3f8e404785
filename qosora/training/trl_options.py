"""`TrainConfig` to the configuration of a trainer of TRL: what options are called there, and which it must not set.

Precision. In "bf16" whatever is not decomposed is loaded in bfloat16 and nothing is autocast: `QosoraLinear` keeps its
vectors in float32 and scales in float32 by itself, and norms and the loss compute in float32 in transformers and TRL,
so autocast would add casts and no accuracy. It is needed, and on, with `modules_to_save`, which PEFT trains in float32
between bfloat16 layers. "fp16" always runs under autocast, for its loss scaling. "fp32" is float32 throughout.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from qosora.adapter import divided_by_accelerate, told_by_accelerate
from qosora.compat.transformers import use_one_gpu
from qosora.compat.trl import liger_warning
from qosora.errors import ConfigError, first_line, near_miss
from qosora.training.config import TrainConfig
from qosora.training.methods import METHODS

__all__ = ["choose_precision", "choose_strategy", "trl_config"]

logger = logging.getLogger("qosora")

#: Options of TRL that have another name here, or none because qosora does it: what to say of them.
_ELSEWHERE = {
    "activation_checkpointing": "gradient_checkpointing", "assistant_only_loss": "completion_only",
    "bf16": "precision", "chat_template_path": None, "completion_only_loss": "completion_only", "dataset_kwargs": None,
    "dataset_text_field": "text_column", "eos_token": None, "fp16": "precision",
    "gradient_accumulation_steps": "gradient_accumulation", "include_num_input_tokens_seen": None,
    "lr_scheduler_type": "schedule", "model_init_kwargs": None, "num_train_epochs": "epochs", "optim": "optimizer",
    "pad_token": None, "per_device_eval_batch_size": "eval_batch_size", "per_device_train_batch_size": "batch_size",
    "resume_from_checkpoint": "resume", "truncation_mode": None, "use_cpu": None, "use_liger_kernel": "use_liger",
    "warmup_steps": "warmup_ratio",
}  # fmt: skip

#: Tokens of an answer that a model gives to be rewarded, at most.
ANSWER_LENGTH = 256


def choose_precision(precision: str) -> str:
    """Return "bf16", "fp16" or "fp32".

    Args:
        precision: One of these, or "auto".

    Raises:
        ConfigError: The device cannot compute in it.
    """
    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        raise ConfigError("precision fp16 needs a GPU: its loss scaling does not run on a CPU; use bf16 or fp32")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("this GPU does not compute in bfloat16; use precision fp16, or fp32")
    if precision != "auto":
        return precision
    if not cuda:
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    logger.warning("this GPU does not compute in bfloat16: training in fp16, which overflows more easily")
    return "fp16"


def choose_strategy(config: TrainConfig) -> tuple[str, bool]:
    """Return "ddp" or "fsdp", and whether the base is in host memory: as configured here, or with accelerate.

    `accelerate launch` hands its configuration on in the environment. It would divide what is trained, too; so it is
    told of nothing but several processes.

    Raises:
        ConfigError: accelerate is configured for what cannot work.
    """
    instead = "use FSDP2: strategy fsdp, in several processes without FSDP or DeepSpeed of accelerate's"
    way = divided_by_accelerate()
    if config.trl.get("deepspeed") or way == "DeepSpeed":
        raise ConfigError(f"DeepSpeed does not divide tensors of 4 bits; {instead}")
    if config.trl.get("fsdp") or config.trl.get("fsdp_config"):
        raise ConfigError(f"trl: fsdp would divide what is trained, too; {instead}")
    strategy, on_host = config.strategy, config.base_on == "host"
    if way is not None:
        if way != "FSDP2":
            raise ConfigError(f"accelerate is configured for {way}, which does not divide tensors of 4 bits; {instead}")
        strategy, on_host = "fsdp", on_host or told_by_accelerate("FSDP_OFFLOAD_PARAMS")
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    return strategy, on_host


def _staying(arguments: type[TrainingArguments]) -> type[TrainingArguments]:
    """Return a configuration by which the trainer leaves the model where it is."""
    return type("Staying", (arguments,), {"place_model_on_device": property(lambda _: False)})


def trl_config(
    config: TrainConfig, precision: str, output_dir: Path, *, stays: bool = False, processes: int = 1
) -> Any:
    """Return TRL's configuration of a run.

    Args:
        config: Of the run.
        precision: "bf16", "fp16" or "fp32".
        output_dir: Of the trainer.
        stays: Whether the trainer leaves the model where it is.
        processes: That train together.

    Raises:
        ConfigError: With every problem of `config.trl`, and what TRL refuses.
    """
    problems = _problems(config) + _missing_parts(config)
    if problems:
        raise ConfigError(problems)
    kind = METHODS[config.method].config
    options = {**_options(config, precision, output_dir, processes), **_numbers(config.trl)}
    if "router_aux_loss_coef" in {field.name for field in fields(kind)}:  # routers are frozen: there is none to balance
        options.setdefault("router_aux_loss_coef", 0.0)
    with warnings.catch_warnings():
        # TRL points to kernels of the hub instead of Liger; its FutureWarning is for programmers
        warnings.filterwarnings("ignore", message=liger_warning())
        try:
            arguments = (_staying(kind) if stays else kind)(**options)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"TRL refuses the options: {error}") from error
    use_one_gpu(arguments)  # several would copy the base at each step
    return arguments


def _options(config: TrainConfig, precision: str, output_dir: Path, processes: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    schedule: dict[str, Any] = {} if config.max_steps is None else {"max_steps": config.max_steps}
    if config.schedule == "cosine_with_min_lr":  # transformers has no default for where it ends
        schedule["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
    return {
        **schedule,
        **_of_method(config, processes),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a part of all steps
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "bf16": precision == "bf16" and bool(config.modules_to_save),
        "fp16": precision == "fp16",
        "activation_checkpointing": config.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": config.use_liger,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # it would show the last loss in place of NaN
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": config.save_total_limit,
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps,
        "report_to": config.report_to or "none",
        "run_name": output_dir.name,  # without one, trackio takes what comes after training for another run
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
    }


def _of_method(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Return the options that not all trainers have."""
    if config.method == "classify":
        return {"include_num_input_tokens_seen": "non_padding"}
    shared = {"trust_remote_code": config.trust_remote_code} | ({} if config.beta is None else {"beta": config.beta})
    if config.method == "sft":
        return shared | {
            # examples come truncated; packed ones are cut by TRL's packing
            "max_length": config.max_length if config.packing else None,
            "packing": config.packing,
            "dataset_kwargs": {"skip_prepare_dataset": not config.packing},
            "remove_unused_columns": False,  # of images there is but a number; else there are none
            "activation_offloading": config.activation_offloading,
            "include_num_input_tokens_seen": "non_padding",
        }
    if config.method == "grpo":
        step = config.batch_size * config.gradient_accumulation * processes
        return shared | {
            "num_generations": config.num_generations or min(8, step),
            "max_completion_length": config.max_completion_length or ANSWER_LENGTH,
        }
    if config.method == "orpo":  # it takes the columns that it makes, whatever it is told, and says so
        return shared | {"max_length": config.max_length, "remove_unused_columns": False}
    return shared | {"max_length": config.max_length, "activation_offloading": config.activation_offloading}


def _numbers(value: Any) -> Any:
    """Return plain data with numbers for texts such as "1e-8", which YAML takes for text as they have no point."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value) else value


def _problems(config: TrainConfig) -> list[str]:
    kind = METHODS[config.method].config
    known = {f.name for f in fields(kind) if f.init}
    ours = {f.name for f in fields(TrainConfig)}
    problems = []
    for name in config.trl:
        if name not in known:
            problems.append(f"trl: TRL's {kind.__name__} has no option {name!r}{near_miss(name, known)}")
        elif name in ours or _ELSEWHERE.get(name):
            problems.append(f"trl: {name} is the option {_ELSEWHERE.get(name) or name!r} of qosora; set that")
        elif name in _ELSEWHERE and _ELSEWHERE[name] is None:
            problems.append(f"trl: {name} has no effect here, as qosora loads the model and prepares the data itself")
    return problems


def _missing_parts(config: TrainConfig) -> list[str]:
    problems = []
    if config.use_liger and importlib.util.find_spec("liger_kernel") is None:
        problems.append("use_liger needs the package liger-kernel: pip install liger-kernel")
    for name in config.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            problems.append(f"report_to: {name!r} cannot be used here: {first_line(error)}")
    if config.activation_offloading and not torch.cuda.is_available():
        problems.append("activation_offloading moves activations from a GPU to host memory, and there is no GPU")
    return problems
