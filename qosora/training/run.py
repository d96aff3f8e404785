"""`train`: a base, data and a configuration to an adapter, on a trainer of TRL with the packed optimizer.

All that can be known to be wrong is found (`resolve_run`) before the model is loaded, and the output folder is made
only when the trainer stands.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from transformers.trainer_callback import PrinterCallback

from qosora.base import load_adapter, load_base
from qosora.checkpoints import adapter_config, sees
from qosora.compat.torch import says_peer_is_gone
from qosora.compat.transformers import TRAINER_LOGGER, is_of_mtime, old_names_warning
from qosora.compat.trl import liger_warning
from qosora.data import no_progress_bars
from qosora.errors import CheckpointError, ConfigError, EndedElsewhere, FingerprintError, QosoraError, first_line
from qosora.inference import on_text_alone, perplexity
from qosora.layers import apply_tiling, compile_layers, qosora_modules, require_checkpointing
from qosora.training.checks import Run, resolve_run
from qosora.training.config import FIGURES, TrainConfig
from qosora.training.heads import with_head
from qosora.training.optimizer import trainer_optimizer
from qosora.training.processes import Processes
from qosora.training.run_folder import RunFolder
from qosora.training.sharding import group_of_one, shard
from qosora.training.trainer import TRAINERS, QosoraTrainer, Recorder, peak_memory_bytes

__all__ = ["TrainResult", "train"]

logger = logging.getLogger("qosora")

#: Tokens of a tile to advise where memory runs out. Each tile dequantizes the weights: shorter ones take more time.
_SHORT_TILE = 1024


@dataclass(frozen=True)
class TrainResult:
    """What a run did; losses of SFT are means over supervised tokens, evaluation's are None without evaluation data.

    Of a classifier, `supervised_tokens` counts classes.

    `figures` has what shows a method's success, such as the reward, each in the first tenth of the steps and in the
    last, or before and after, where it was evaluated. `peak_memory_bytes` is that of the process with the most, and
    `longest` the tokens of the longest sequence, with its answer where answers are rewarded.
    """

    output_dir: str
    steps: int
    examples: int
    supervised_tokens: int
    trained_parameters: int
    adapter_bytes: int
    train_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    precision: str
    wall_seconds: float
    peak_memory_bytes: int
    resumed_from: int | None
    # results written by earlier versions have none of these
    processes: int = 1
    method: str = "sft"
    figures: dict[str, list[float]] = field(default_factory=dict)
    longest: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self) -> list[str]:
        """Return lines for a reader."""
        counted = {"classify": "classes", "reward": "tokens"}.get(self.method, "supervised tokens")
        tokens = f" ({self.supervised_tokens:,} {counted})" * (self.supervised_tokens > 0)
        lines = [
            f"trained {self.trained_parameters:,} parameters for {self.steps} steps on {self.examples:,} examples"
            f"{tokens} in {self.wall_seconds:.0f} s, {self.precision}, "
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        ]
        if self.method != "sft":
            for name, (first, last) in self.figures.items():
                when = "before and after" if name.startswith("eval_") else "first and last tenth of the steps"
                lines.append(f"{name} {first:.4f} -> {last:.4f} ({when})")
        else:
            lines.append(f"training loss {self.train_loss:.4f} (mean of the last tenth of the steps)")
            if self.eval_loss_before is not None and self.eval_loss_after is not None:
                before, after = self.eval_loss_before, self.eval_loss_after
                lines.append(
                    f"evaluation loss {before:.4f} -> {after:.4f}, "
                    f"perplexity {perplexity(before):.3f} -> {perplexity(after):.3f}"
                )
        return [*lines, f"adapter: {self.output_dir} ({self.adapter_bytes / 2**10:,.0f} KiB)"]


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune a base as a configuration says.

    Args:
        config: `TrainConfig(...)`, or `TrainConfig.load(FILE, FLAGS)`.

    Raises:
        ConfigError: Options that cannot work, or an output folder that must not be used.
        DataError: Data that cannot be used.
        CheckpointError: The model is no qosora base.
        QosoraError: Training diverged or ran out of memory; the run can be resumed from its last checkpoint.

    Example:
        >>> train(TrainConfig(model="llama-2-7b-qosora", data="train.jsonl", output_dir="run"))  # doctest: +SKIP
    """
    start = time.perf_counter()
    processes = Processes.here()
    with ExitStack() as lock:
        with processes.agreed():
            if processes.main:
                lock.enter_context(RunFolder(config).locked())
        with processes.agreed():
            folder = RunFolder(config)  # as it is when nobody else can change it
        if (result := processes.from_main(folder.finished)) is not None:
            logger.info("the run in %s is finished already", folder.path)
            return TrainResult(**result)
        with processes.agreed():
            run = resolve_run(config, folder, processes)
            folder.check_made_of(run.made_of)
            if config.resume and not folder.resuming:
                logger.info("there is no run in %s to go on with: a new one begins", folder.path)
        alone = on_text_alone(run.model_config) if run.seer is None else nullcontext()
        with _quiet(), _advice(run), alone, ExitStack() as group:
            if run.sharded:
                group.enter_context(group_of_one(run.arguments.device))
            with processes.agreed():
                trainer, recorder = _trainer(run)
            try:
                evaluations, resumed_from = _run(trainer, run)
            except BaseException:
                if processes.main:
                    folder.discard()
                raise
            finally:
                recorder.close()
            return _finish(trainer, run, evaluations, resumed_from, time.perf_counter() - start)


def _trainer(run: Run) -> tuple[Any, Recorder]:
    """Load the base and build the trainer; nothing stays on disk if that fails."""
    config = run.config
    recorder = Recorder(run.folder.metrics, config.progress, run.processes.main, FIGURES[config.method][0])
    try:
        model: Any = load_base(
            run.source,
            config=run.model_config,
            dtype=run.dtype,
            device_map="cpu" if run.sharded else None,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
        transformers.set_seed(config.seed)  # TRL draws an update's A before Trainer has set it
        if config.gradient_checkpointing:
            require_checkpointing(model)
        own_tokens = len(model.get_input_embeddings().weight)
        if run.begun is not None:
            model = load_adapter(model, run.begun, is_trainable=True)
        if run.arguments.ddp_find_unused_parameters is None:  # an expert may get no token of a process's batch
            experts = any("experts" in name for name in qosora_modules(model))
            run.arguments.ddp_find_unused_parameters = experts or sees(run.model_config)  # and a tower no image
        trainer = TRAINERS[config.method](
            model=model,
            args=run.arguments,
            processes=run.processes,
            **_of_method(run),
            save_embeddings=len(model.get_input_embeddings().weight) != own_tokens,
            processing_class=run.tokenizer,
            peft_config=with_head(run.adapter, model) if run.begun is None else None,
            optimizer_cls_and_kwargs=trainer_optimizer(
                run.arguments,
                optimizer=config.optimizer,
                lr=run.learning_rate,
                update_lr=run.update_learning_rate,
                modules_to_save_lr=run.modules_to_save_learning_rate,
            ),
            callbacks=[recorder],
        )
    except BaseException as error:
        if run.processes.main:
            run.folder.discard()
        if isinstance(error, (ValueError, ImportError)) and not isinstance(error, QosoraError):
            raise ConfigError(f"the trainer refuses the options: {error}") from error
        raise
    # After the trainer has put in Liger's kernels
    if config.compile:
        compile_layers(trainer.model)
    else:
        apply_tiling(trainer.model, run.tiling.length, mlps=run.tiling.mlps)
    if run.sharded:
        kept = trainer.save_embeddings
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings()) if kept else ()
        shard(trainer.model, run.arguments.device, on_host=run.on_host, whole=embeddings)
        trainer.accelerator.device_placement = False  # it would move all of it
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict; the bar shows them
    return trainer, recorder


def _of_method(run: Run) -> dict[str, Any]:
    """Return what not all trainers take alike."""
    if run.config.method == "classify":
        held_out = run.held_out.tokenized.examples if run.held_out else None
        examples = run.data.tokenized.examples
        return {"train_dataset": examples, "eval_dataset": held_out, "eval_examples": held_out or []}
    data = {"train_dataset": run.data.dataset}
    if run.config.method == "sft":
        return data | {
            # for Trainer's eval_steps alone; `evaluate` measures the examples themselves
            "eval_dataset": Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}) if run.held_out else None,
            "eval_examples": run.held_out.tokenized.examples if run.held_out else [],
            "seer": run.seer,
            "train_examples": run.data.tokenized.examples if run.seer else (),
        }
    rewards = {"reward_funcs": run.rewards} if run.rewards else {}
    return data | {"eval_dataset": run.held_out.dataset if run.held_out else None, **rewards}


def _run(trainer: Any, run: Run) -> tuple[list[dict[str, float]], int | None]:
    """Train; return the evaluations before and after, and the step that training went on from."""
    folder, processes = run.folder, run.processes
    checkpoint = processes.from_main(folder.checkpoint)
    with processes.agreed():
        if checkpoint is not None and not checkpoint.is_dir():
            raise ConfigError(
                f"process {processes.rank} does not see {checkpoint}: to go on with a run, output_dir must be a folder "
                "that all machines share"
            )
    resumed_from = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else None
    if checkpoint is not None:
        _check_base(trainer, checkpoint)
    with processes.agreed():
        if processes.main:
            folder.begin(-1 if resumed_from is None else resumed_from, run.made_of)
    if resumed_from is not None:
        logger.info("resuming after step %d", resumed_from)
    evaluations = processes.from_main(folder.metrics.evaluations)
    if run.held_out and not evaluations:
        if run.config.method == "sft":
            trainer.evaluate()
        else:  # after an evaluation accelerate takes the model for prepared: processes would each train their own
            trainer.args.eval_on_start = True
    if checkpoint is None or not trainer.take_up_finished(checkpoint):
        if isinstance(trainer, QosoraTrainer) and torch.cuda.is_available() and not run.config.packing:
            trainer.try_longest_batch(run.data.tokenized.examples)  # packed ones are of one length
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if run.held_out:
        last = processes.from_main(folder.metrics.evaluations)[-1]
        if last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
            trainer.evaluate()
        evaluations = processes.from_main(folder.metrics.evaluations)
        evaluations = [evaluations[0], evaluations[-1]]
    return evaluations, resumed_from


def _check_base(trainer: Any, checkpoint: Path) -> None:
    """Refuse to go on with another base than a checkpoint's."""
    before = adapter_config(checkpoint).base_fingerprint
    now = trainer.model.peft_config["default"].base_fingerprint
    if before != now:
        raise FingerprintError(
            f"{checkpoint} was trained on the base with fingerprint {before}, but this base has {now}; give the base "
            "that the run began with, or start a new run in another folder"
        )


def _finish(
    trainer: Any,
    run: Run,
    evaluations: list[dict[str, float]],
    resumed_from: int | None,
    wall_seconds: float,
) -> TrainResult:
    """Write the adapter, its tokenizer and the result."""
    model, processes = trainer.model, run.processes
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = processes.from_main(lambda: [line for line in run.folder.metrics.read() if "loss" in line])
    tenth = max(1, len(steps) // 10)
    figures = {}
    for name in FIGURES[run.config.method]:
        for key, lines in ((name, [steps[:tenth], steps[-tenth:]]), (f"eval_{name}", [[e] for e in evaluations])):
            known = [[line[key] for line in some if key in line] for some in lines]
            if all(known) and known:
                figures[key] = [sum(values) / len(values) for values in known]
    if steps and all(line.get("frac_reward_zero_std") == 1 for line in steps):
        logger.warning(
            "the answers to a prompt were always worth the same, so nothing was learned: begin with an adapter that "
            "finds a good answer now and then (train it on examples first), or reward what is partly right, too"
        )
    result = TrainResult(
        output_dir=run.config.output_dir,
        steps=trainer.state.global_step,
        examples=len(run.data),
        supervised_tokens=run.data.tokenized.supervised,
        trained_parameters=sum(p.numel() for p in trained),
        adapter_bytes=sum(p.nbytes for p in trained),
        train_loss=sum(line["loss"] for line in steps[-tenth:]) / tenth if steps else float("nan"),
        eval_loss_before=evaluations[0]["eval_loss"] if evaluations else None,
        eval_loss_after=evaluations[1]["eval_loss"] if evaluations else None,
        longest=max(len(example.input_ids) for example in run.data.tokenized.examples) + run.answer,
        method=run.config.method,
        figures=figures,
        precision=run.precision,
        wall_seconds=round(wall_seconds, 3),
        peak_memory_bytes=max(processes.gathered(peak_memory_bytes())),
        processes=processes.count,
        resumed_from=resumed_from,
    )

    def write(target: Path) -> None:
        trainer.save_adapter(target)
        (run.tokenizer if run.seer is None else run.seer.processor).save_pretrained(target)

    with processes.agreed():
        if processes.main:
            run.folder.finish(result.to_dict(), write)
    return result


@contextmanager
def _advice(run: Run) -> Iterator[None]:
    """Turn running out of GPU memory, of disk, or of the other processes into what to do."""
    config = run.config
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = [f"lower batch_size ({config.batch_size}), raising gradient_accumulation"] * (config.batch_size > 1)
        advice += [f"lower max_length ({config.max_length})"]
        advice += [] if config.gradient_checkpointing else ["turn gradient_checkpointing on"]
        advice += [] if config.activation_offloading else ["turn activation_offloading on"]
        tiled = 0 < run.tiling.length <= _SHORT_TILE or config.batch_size * config.max_length <= _SHORT_TILE
        advice += [] if tiled else [f"set tile_length to {_SHORT_TILE}{', without compile' * config.compile}"]
        advice += ["put the base into host memory (base_on host)"] * (config.base_on == "gpu")
        reason = str(error).splitlines()[0]
        raise QosoraError(f"out of GPU memory: {'; or '.join(advice)} ({reason})") from error
    except (RuntimeError, SafetensorError) as error:
        if run.processes.count > 1 and says_peer_is_gone(error):
            if not run.processes.main:
                raise EndedElsewhere(first_line(error)) from error
            raise QosoraError(
                "another process of this run has ended, or cannot be reached; see what it said, if anything, and go on "
                "with resume"
            ) from error
        if "leaf Variable" in str(error) and config.gradient_checkpointing:  # TRL has embeddings require gradients
            raise QosoraError(
                f"{config.model}: the model changes its embeddings in place, which no adapter can be trained through "
                "with checkpointing: turn gradient_checkpointing off (--no-gradient-checkpointing)"
            ) from error
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save's writer
            raise
        raise CheckpointError(
            f"{run.folder.path}: a checkpoint could not be written ({first_line(error)}); make room on that disk, and "
            "go on with resume"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what libraries say that is not for the user of a training run; each with its reason."""
    mtime = logging.getLogger(TRAINER_LOGGER)
    mtime.addFilter(_no_mtime)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), no_progress_bars():
        # see sft_options
        warnings.filterwarnings("ignore", message=liger_warning())
        # PEFT and TRL call methods of transformers by names that it has changed
        warnings.filterwarnings("ignore", message=old_names_warning(), category=FutureWarning)
        try:
            yield
        finally:
            mtime.removeFilter(_no_mtime)
            if bars:
                transformers.utils.logging.enable_progress_bar()


def _no_mtime(record: logging.LogRecord) -> bool:
    """Drop Trainer's remark that it orders checkpoints by their numbers, and not by their time."""
    return not is_of_mtime(record.getMessage())
