"""A base, data and a configuration become an adapter.

| module | one line |
|---|---|
| `config` | `TrainConfig`: what a user says |
| `methods` | the ways of learning |
| `rewards` | what an answer is worth |
| `trl_options` | a run in TRL's words |
| `flat_buffers` | vectors as windows of flat buffers |
| `optimizer` | the packed paged optimizer |
| `heads` | the head of a classifier, trained in full |
| `processes` | the processes of a run |
| `sharding` | a base that is divided among them, or in host memory |
| `run_folder` | the folder of a run |
| `checks` | a run, checked and resolved before its model is loaded |
| `preview` | what a run would train on |
| `own_logits` | the loss of models whose logits are more than a product |
| `trainer` | TRL's trainers with our evaluation, checkpoints and record |
| `answers` | what a model wrote before it was trained, and writes now |
| `report` | what runs did, on one page |
| `run` | `train` |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.training.checks import records_of as records_of
    from qosora.training.config import AUTO as AUTO
    from qosora.training.config import BATCH_SIZE as BATCH_SIZE
    from qosora.training.config import OPTIMIZER_NAMES as OPTIMIZER_NAMES
    from qosora.training.config import PLACES as PLACES
    from qosora.training.config import RUN_CONFIG as RUN_CONFIG
    from qosora.training.config import STRATEGIES as STRATEGIES
    from qosora.training.config import TrainConfig as TrainConfig
    from qosora.training.flat_buffers import ALIGNMENT as ALIGNMENT
    from qosora.training.flat_buffers import OPTIMIZERS as OPTIMIZERS
    from qosora.training.flat_buffers import PAGED_NUMEL as PAGED_NUMEL
    from qosora.training.flat_buffers import why_unpaged as why_unpaged
    from qosora.training.heads import cast_to_heads as cast_to_heads
    from qosora.training.heads import class_loss as class_loss
    from qosora.training.heads import with_head as with_head
    from qosora.training.optimizer import PackedPagedOptimizer as PackedPagedOptimizer
    from qosora.training.optimizer import create_optimizer as create_optimizer
    from qosora.training.optimizer import parameter_groups as parameter_groups
    from qosora.training.optimizer import trainer_optimizer as trainer_optimizer
    from qosora.training.preview import Preview as Preview
    from qosora.training.preview import preview_run as preview_run
    from qosora.training.processes import Processes as Processes
    from qosora.training.run import TrainResult as TrainResult
    from qosora.training.run import train as train
    from qosora.training.run_folder import RESULT as RESULT
    from qosora.training.run_folder import MetricsLog as MetricsLog
    from qosora.training.trainer import QosoraTrainer as QosoraTrainer
    from qosora.training.trainer import Recorder as Recorder
    from qosora.training.trl_options import choose_precision as choose_precision
    from qosora.training.trl_options import trl_config as trl_config

__getattr__, __dir__ = door(
    __name__,
    {
        "config": ["AUTO", "BATCH_SIZE", "OPTIMIZER_NAMES", "PLACES", "RUN_CONFIG", "STRATEGIES", "TrainConfig"],
        "trl_options": ["choose_precision", "trl_config"],
        "checks": ["records_of"],
        "preview": ["Preview", "preview_run"],
        "processes": ["Processes"],
        "run_folder": ["RESULT", "MetricsLog"],
        "flat_buffers": ["ALIGNMENT", "OPTIMIZERS", "PAGED_NUMEL", "why_unpaged"],
        "heads": ["cast_to_heads", "class_loss", "with_head"],
        "optimizer": ["PackedPagedOptimizer", "create_optimizer", "parameter_groups", "trainer_optimizer"],
        "trainer": ["QosoraTrainer", "Recorder"],
        "run": ["TrainResult", "train"],
    },
)
