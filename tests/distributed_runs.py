"""What each of several processes does in the tests of `qosora.training.processes`: a script, started once in each.

All runs of the tests are made by the same processes, as it is their start that takes the time.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qosora.base import load_base, load_tokenizer
from qosora.compat.transformers import old_names_warning
from qosora.config import OsoraConfig
from qosora.errors import QosoraError
from qosora.training import Processes, Recorder, TrainConfig, train, trainer_optimizer

RANK = os.environ.get("RANK", "0")


def outcome(how: str, *, stop_after: int | None = None, bad_on: str | None = None, **options: Any) -> Any:
    """Return the result of a run, or the error that it ended with.

    Args:
        how: "train", or "by hand".
        stop_after: The step after which it is interrupted.
        bad_on: The process that finds no data.
        options: Of the run.
    """
    if bad_on == RANK:
        options["data"] = "none.jsonl"
    try:
        with interrupted(stop_after):
            return train(TrainConfig(**options)).to_dict() if how == "train" else by_hand(**options)
    except (QosoraError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def interrupted(after: int | None) -> Iterator[None]:
    """Raise KeyboardInterrupt after a step."""
    own = Recorder.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own(self, args, state, control, **kwargs)
        if state.global_step == after:
            raise KeyboardInterrupt

    with patch.object(Recorder, "on_step_end", on_step_end):
        yield


def by_hand(model: str, rows: list[list[int]], output_dir: str, batch_size: int) -> dict[str, Any]:
    """Train as TRL's users do; return the vectors."""
    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = tokenizer.eos_token
    with warnings.catch_warnings():  # as in `qosora.training.run`
        warnings.filterwarnings("ignore", message=old_names_warning(), category=FutureWarning)
        args = SFTConfig(
            output_dir, use_cpu=True, bf16=False, per_device_train_batch_size=batch_size, max_steps=3,
            learning_rate=1e-2, adam_epsilon=1e-3, report_to="none", save_strategy="no", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = SFTTrainer(
            model=load_base(model),
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=tokenizer,
            peft_config=OsoraConfig(task_type="CAUSAL_LM"),
            optimizer_cls_and_kwargs=trainer_optimizer(args),
        )
        trainer.train()
    return {name: p.tolist() for name, p in trainer.model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs, results = (Path(path) for path in sys.argv[1:])
    made = {name: outcome(**options) for name, options in json.loads(runs.read_text(encoding="utf-8")).items()}
    Processes.leave()
    (results / f"{RANK}.json").write_text(json.dumps(made), encoding="utf-8")
