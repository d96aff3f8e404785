"""TRL's trainers with checkpoints of vectors alone and a record of each step, and `SFTTrainer` with our evaluation.

Trainer's own evaluation of a loss averages over batches, its checkpoints carry the tokenizer and a pickle of the
arguments, and its progress bar shows neither speed nor memory; these three are replaced, all else is TRL's.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from qosora.checkpoints import ADAPTER_STEM
from qosora.compat.trl import know_parameters_again, loss_chunks, orpo
from qosora.data import IGNORED, Example, Seer, batches_by_length, class_batch, padded_batch
from qosora.errors import EndedElsewhere, QosoraError
from qosora.inference import batch_losses, class_metrics, class_names, inference, judge, pad_token, perplexity
from qosora.layers import panel_of
from qosora.training.heads import cast_to_heads, class_loss
from qosora.training.own_logits import keep_own_logits
from qosora.training.processes import Processes
from qosora.training.run_folder import MetricsLog
from qosora.training.sharding import is_sharded

__all__ = ["TRAINERS", "QosoraTrainer", "Recorder", "peak_memory_bytes"]

#: What trainers log that a line of the record has under another name, or that is about the whole run.
_NOT_LOGGED = {"num_tokens", "num_input_tokens_seen", "total_flos", "step_time"}


class _OfVectors:
    """What is the same in all trainers.

    Args:
        processes: That train together; this one alone by default.
        save_embeddings: Whether the embeddings are saved with the adapter, as where it brings more than the base has.
        optimizer_cls_and_kwargs: As of `transformers.Trainer`; not all trainers of TRL hand it on.
        **kwargs: Of TRL's trainer.
    """

    #: Whether TRL has changed the model to return tokens' log-probabilities, not logits.
    keeps_own_logits = True
    model: Any
    args: Any
    state: Any
    control: Any

    def __init__(
        self,
        *,
        processes: Processes | None = None,
        save_embeddings: bool = False,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.processes, self.save_embeddings = processes or Processes(), save_embeddings
        super().__init__(**kwargs)
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._panel = panel_of(self.model)
        if self.keeps_own_logits:
            keep_own_logits(self.model.get_base_model(), getattr(self, "temperature", 1.0))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer, which moves the vectors: what is offloaded must not take them for activations."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        know_parameters_again(self)
        return optimizer

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, of smaller parts of the vocabulary where the head decodes each."""
        with loss_chunks(self._panel):
            return super().compute_loss(*args, **kwargs)  # type: ignore[misc]

    def take_up_finished(self, checkpoint: Path) -> bool:
        """Take the vectors and the state of a checkpoint after the run's last step; return False where it is earlier.

        Trainer would do one step more.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not 0 < state.max_steps <= state.global_step:
            return False
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        file = f"{ADAPTER_STEM}.safetensors"
        folder = Path(best) if best and (Path(best) / file).is_file() else checkpoint
        set_peft_model_state_dict(self.model, load_file(folder / file))
        return True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter alone: not the tokenizer, which would be larger, and no pickle of the arguments."""
        self.save_adapter(output_dir or self.args.output_dir)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter into a folder."""
        # TRL's reference is an adapter, too
        self.model.save_pretrained(folder, save_embedding_layers=self.save_embeddings, selected_adapters=["default"])

    def _evaluated(self, found: dict[str, float], prefix: str, start: float) -> dict[str, float]:
        """Log what an evaluation found, and tell all who listen."""
        found = {**found, "runtime": time.perf_counter() - start}
        metrics = {f"{prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)  # type: ignore[attr-defined]
        listeners = self.callback_handler  # type: ignore[attr-defined]
        self.control = listeners.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's would appear in the run's folder with the first checkpoint."""


class QosoraTrainer(_OfVectors, SFTTrainer):
    """As `SFTTrainer`.

    Args:
        eval_examples: What `evaluate` measures.
        seer: What makes batches of examples with images: of `train_examples`, by the data set's column number.
        train_examples: With images.
        **kwargs: Of `SFTTrainer`, and `processes` and `save_embeddings`.
    """

    train_dataset: Any

    def __init__(
        self,
        *,
        eval_examples: Sequence[Example],
        seer: Seer | None = None,
        train_examples: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        self.eval_examples, self.seer = eval_examples, seer
        if seer is not None:
            kwargs["data_collator"] = lambda rows: seer.batch([train_examples[row["number"]] for row in rows])
        super().__init__(**kwargs)
        if self._divides_evenly():
            self.train_dataset = concatenate_datasets([self.train_dataset, _no_example(self.train_dataset)])

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return loss and perplexity per supervised token of the evaluation examples, and log them."""
        start = time.perf_counter()
        rank, count = self.processes.rank, self.processes.count
        size = self.args.per_device_eval_batch_size
        if is_sharded(self.model) or self.seer is not None:
            mine = self._losses_by_forward(size)
        else:
            mine = batch_losses(self.model, self.eval_examples, size, part=rank, parts=count)
        parts = self.processes.gathered(mine)
        in_order = (loss for batch in zip_longest(*parts, fillvalue=0.0) for loss in batch)
        loss = sum(in_order) / sum(example.supervised for example in self.eval_examples)
        return self._evaluated({"loss": loss, "perplexity": perplexity(loss)}, metric_key_prefix, start)

    def _losses_by_forward(self, size: int) -> list[float]:
        """Do as `batch_losses` by the model's own forward, which brings together what is divided, and sees."""
        rank, count = self.processes.rank, self.processes.count
        batches = batches_by_length(self.eval_examples, size)
        losses = []
        with inference(self.model):
            for first in range(0, len(batches), count):
                mine = batches[min(first + rank, len(batches) - 1)]  # one too many takes part, and does not count
                batch = {name: tensor.to(self.args.device) for name, tensor in self._batch(mine).items()}
                with loss_chunks(self._panel):
                    outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
                losses.append(-outputs.log_probs.sum().item() if first + rank < len(batches) else 0.0)
        return losses

    def _batch(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        return padded_batch(examples) if self.seer is None else self.seer.batch(examples)

    def _divides_evenly(self) -> bool:
        """Say whether the batches of an epoch are divided by `_WholeRounds`; other orders are TRL's."""
        random = self.args.train_sampling_strategy == "random" and not self.args.dataloader_drop_last
        return self.processes.count > 1 and random and self.seer is None  # an example that is none has no pixels

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return an order that all processes share evenly, without an example twice."""
        if not self._divides_evenly():
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = self.args.train_batch_size * self.processes.count
        return _WholeRounds(len(self.train_dataset) - 1, size, seed, epoch=lambda: int(self.state.epoch or 0))

    def try_longest_batch(self, examples: Sequence[Example]) -> None:
        """Compute the gradients of the longest examples, and drop them: if memory is to run out, it does so here.

        Neither the vectors nor random numbers change, so the run is as without it.
        """
        args = self.args
        longest = sorted(examples, key=lambda e: -len(e.input_ids))[: args.per_device_train_batch_size]
        batch = {name: tensor.to(args.device) for name, tensor in self._batch(longest).items()}
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        mixed = torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)
        self.model.train()
        on_gpu = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu), self.maybe_activation_offload_context:
            with mixed, loss_chunks(self._panel):
                outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
            outputs.log_probs.sum().backward()
        self.model.zero_grad()


class ClassifierTrainer(_OfVectors, Trainer):
    """As `Trainer`, of the loss of each class, with our evaluation.

    Args:
        model: A classifier.
        eval_examples: What `evaluate` measures.
        peft_config: What to train, where the model has no adapter yet.
        args: As of `Trainer`.
        **kwargs: Of `Trainer`, and `processes` and `save_embeddings`.
    """

    keeps_own_logits = False

    def __init__(self, *, model: Any, eval_examples: Sequence[Any], peft_config: Any, args: Any, **kwargs: Any) -> None:
        self.eval_examples = eval_examples
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if args.activation_checkpointing:
            model.enable_input_require_grads()
        cast_to_heads(model)
        collate = partial(class_batch, pad=pad_token(model.config))
        super().__init__(model=model, args=args, data_collator=collate, compute_loss_func=class_loss, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return loss, accuracy and F1 of the evaluation examples, and log them."""
        start = time.perf_counter()
        rank, count = self.processes.rank, self.processes.count
        mine = judge(self.model, self.eval_examples, self.args.per_device_eval_batch_size, part=rank, parts=count)
        judged = [one for part in self.processes.gathered(mine) for one in part]
        found = class_metrics(judged, class_names(self.model.config))
        return self._evaluated(found, metric_key_prefix, start)


class _RewardTrainer(_OfVectors, RewardTrainer):
    keeps_own_logits = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        cast_to_heads(self.model)


class _DPOTrainer(_OfVectors, DPOTrainer):
    pass


class _KTOTrainer(_OfVectors, KTOTrainer):
    pass


class _ORPOTrainer(_OfVectors, orpo("ORPOTrainer")):  # type: ignore[misc]
    keeps_own_logits = False


class _GRPOTrainer(_OfVectors, GRPOTrainer):
    pass


#: By the method of a run.
TRAINERS: dict[str, type[Any]] = {
    "sft": QosoraTrainer, "dpo": _DPOTrainer, "kto": _KTOTrainer, "orpo": _ORPOTrainer, "grpo": _GRPOTrainer,
    "reward": _RewardTrainer, "classify": ClassifierTrainer,
}  # fmt: skip


class _WholeRounds(Sampler[int]):
    """The order of one process, filled up to whole rounds of all with the example that is none, the last.

    accelerate would fill them with examples from the beginning, which then count twice. It would also tell the order
    its epoch (`set_epoch`), but not where a run goes on in the middle of one; so the order asks.
    """

    def __init__(self, examples: int, round_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.order, self.epoch = SeedableRandomSampler(range(examples), data_seed=seed), epoch
        self.fill = -examples % round_size

    def __iter__(self) -> Iterator[int]:
        self.order.set_epoch(self.epoch())
        yield from self.order
        yield from [len(self.order)] * self.fill

    def __len__(self) -> int:
        return len(self.order) + self.fill


def _no_example(dataset: Dataset) -> Dataset:
    """Return an example without supervised tokens, which adds nothing to a loss or a gradient, for a data set."""
    values = {"input_ids": [[0]], "labels": [[IGNORED]], "seq_lengths": [[1]]}
    return Dataset.from_dict({name: values[name] for name in dataset.column_names}, features=dataset.features)


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, shows the progress bar, and stops a run whose loss is no number any more.

    Args:
        metrics: Where to write.
        progress: Whether to show the bar, on stderr; a line now and then where that is no terminal.
        main: Whether this process writes and shows anything.
        figure: Which of the logged values the bar shows.
    """

    def __init__(self, metrics: MetricsLog, progress: bool, main: bool = True, figure: str = "loss") -> None:
        self.metrics, self.progress, self.main, self.figure = metrics, progress and main, main, figure
        self.bar: Any = None
        self.start = self.last_time = time.perf_counter()
        self.tokens_before = self.last_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar and the clock."""
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True,
            mininterval=interval, maxinterval=interval, disable=not self.progress,
        )  # fmt: skip
        if state.global_step and not state.num_input_tokens_seen:  # trainers of TRL's own count begin at 0 again
            self.tokens_before = next((line["tokens"] for line in reversed(self.metrics.read()) if "tokens" in line), 0)
        self.last_time, self.last_tokens = time.perf_counter(), state.num_input_tokens_seen or self.tokens_before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line.

        Raises:
            QosoraError: The loss is infinite or not a number.
        """
        logs = logs or {}
        if "eval_loss" in logs:
            line = {"step": state.global_step, **_numbers({k: v for k, v in logs.items() if k.startswith("eval_")})}
            self._write(line)
            self.last_time = time.perf_counter()  # evaluation does not count as training time
        elif "loss" in logs:
            tokens = int(state.num_input_tokens_seen) or self.tokens_before + int(logs.get("num_tokens", 0))
            values = {k: v for k, v in logs.items() if k not in _NOT_LOGGED and not k.startswith("train_")}
            line = {"step": state.global_step, **_numbers(values), "loss": logs["loss"], **self._speed(tokens)}
            self._write(line)
            self._show(line)
            if not math.isfinite(line["loss"]):
                if not self.main:
                    raise EndedElsewhere("training diverged; see what the first process said")
                raise QosoraError(
                    f"the loss is {line['loss']} at step {state.global_step}: training diverged. Lower learning_rate"
                    + (", or train in bf16, which does not overflow as fp16 does" if args.fp16 else "")
                )

    def _write(self, line: dict[str, Any]) -> None:
        if self.main:
            self.metrics.append(line)

    def _speed(self, tokens: int) -> dict[str, Any]:
        now = time.perf_counter()
        rate = (tokens - self.last_tokens) / max(now - self.last_time, 1e-9)
        self.last_time, self.last_tokens = now, tokens
        counted = {"tokens": tokens, "tokens_per_second": round(rate, 1)} if tokens else {}  # not all trainers count
        return {**counted, "peak_memory_bytes": peak_memory_bytes(), "wall_seconds": round(now - self.start, 3)}

    def _show(self, line: dict[str, Any]) -> None:
        shown = [f"{self.figure} {line[self.figure]:.4f}"] if self.figure in line else []
        shown += [f"lr {line['learning_rate']:.2e}"]
        shown += [f"{line['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in line else []
        self.bar.set_postfix_str(", ".join([*shown, f"{line['peak_memory_bytes'] / 2**30:.2f} GiB"]), refresh=False)

    def close(self) -> None:
        """End the bar, also after an error."""
        if self.bar is not None:
            self.bar.close()


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return what can be written: a mean of nothing cannot."""
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def peak_memory_bytes() -> int:
    """Return the most memory used so far: the GPU's allocations, or the process's resident set without a GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
