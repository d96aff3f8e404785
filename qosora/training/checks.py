"""A run resolved: all of it that is checked before its model is loaded, in the order of what it costs.

The options, then the base's kind, then the data to the last token. What an option leaves open is decided here, and
config.json is read here: `Run` holds the results, and nothing after it asks again. Examples are tokenized here and not
by TRL, so that the tokens that were counted are those that are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from qosora.base import load_tokenizer
from qosora.checkpoints import (
    ADAPTER_STEM,
    REWARD,
    TAGS,
    TEXTS,
    file_digest,
    load_config,
    local_folder,
    model_class_of,
    require_base,
    require_language_model,
    sees,
    split_source,
    task_of,
)
from qosora.config import OsoraConfig
from qosora.data import (
    Columns,
    Prepared,
    Records,
    Seer,
    load_records,
    most_positions,
    pad_within,
    prepare,
    refuse_foreign_tokens,
    split_to_measure,
)
from qosora.dtypes import dtype_named
from qosora.errors import CheckpointError, ConfigError
from qosora.inference import seer_of
from qosora.layers import Tiling
from qosora.training.config import AUTO, HEAD_RATE, WHOLE_RATE, TrainConfig
from qosora.training.methods import METHODS
from qosora.training.optimizer import UPDATE_RATE
from qosora.training.processes import Processes
from qosora.training.rewards import load_rewards, reward_digests
from qosora.training.run_folder import STEP_EXAMPLES, RunFolder
from qosora.training.trl_options import choose_precision, choose_strategy, trl_config

__all__ = ["Run", "records_of", "resolve_run"]


@dataclass(frozen=True)
class Run:
    """A run that can begin.

    Args:
        config: As given.
        folder: Not made yet.
        precision: "bf16", "fp16" or "fp32".
        dtype: That of the precision.
        tiling: What computes in tiles.
        arguments: Of TRL's trainer.
        learning_rate: Of the vectors.
        update_learning_rate: Of an update's A and B.
        modules_to_save_learning_rate: Of all else that is trained.
        adapter: What is trained.
        begun: Folder or hub id of the adapter that is trained on, or None to begin with the base's vectors.
        source: Folder (absolute, as the adapter records it) or hub id of the base.
        model_config: The base's.
        tokenizer: The base's.
        data: To train on.
        held_out: To evaluate on.
        rewards: Of answers, where they are learned from.
        answer: Tokens of an answer at most; 0 where none are learned from.
        seer: What makes pixels, where the data have images.
        made_of: What else determines the run: hashes, by what a message calls it, and the examples of a step.
        processes: That train together.
        sharded: Whether each process holds a part of the base only, or none on its GPU.
        on_host: Whether the base is in host memory.
    """

    config: TrainConfig
    folder: RunFolder
    precision: str
    dtype: torch.dtype
    tiling: Tiling
    arguments: Any
    learning_rate: float
    update_learning_rate: float
    modules_to_save_learning_rate: float
    adapter: OsoraConfig
    begun: str | None
    source: str
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    held_out: Prepared | None
    rewards: list[Callable[..., Any]]
    answer: int
    seer: Seer | None
    made_of: dict[str, Any]
    processes: Processes
    sharded: bool
    on_host: bool


def resolve_run(config: TrainConfig, folder: RunFolder, processes: Processes) -> Run:
    """Check a run and read its data; nothing is written.

    Raises:
        ConfigError: Options that cannot work.
        DataError: Data that cannot be used.
        CheckpointError: The model is no qosora base.
    """
    if config.batch_size == AUTO:
        raise ConfigError("batch_size auto is not yet settled; train(qosora.memory.fit_batch_size(config))")
    _check_schedule(config)
    precision = choose_precision(config.precision)
    strategy, on_host = choose_strategy(config)
    sharded = on_host or (strategy == "fsdp" and processes.count > 1)
    if config.method == "grpo" and sharded and processes.count > 1:
        raise ConfigError(
            "method grpo has each process generate for itself, which a base that is divided among them cannot: use "
            "strategy ddp with base_on gpu, or one process"
        )
    arguments = trl_config(config, precision, folder.path, stays=sharded, processes=processes.count)
    adapter = _adapter_config(config)
    model, begun = split_source(config.model)
    if begun is not None:
        _check_begun(config, begun)
    source = str(Path(model).resolve()) if Path(model).exists() else model
    model_config = load_config(source, trust_remote_code=config.trust_remote_code)
    require_base(source, model_config)
    task = _task(config, source, model_config)
    if task is not None and sharded:
        raise ConfigError(f"method {config.method} takes the whole base on each GPU: strategy ddp with base_on gpu")
    tokenizer = load_tokenizer(begun, source, trust_remote_code=config.trust_remote_code)
    seer = _Seers(config, source, model_config, dtype_named(precision))
    data, held_out = _prepared(config, source, model_config, tokenizer, seer)
    if seer.used is not None and sharded:
        raise ConfigError("data with images take the whole base on each GPU: strategy ddp with base_on gpu")
    rewards = load_rewards(config.reward, data.dataset.column_names)
    _pad_within(tokenizer, model_config)
    answer = arguments.max_completion_length if config.method == "grpo" else 0
    _check_fit(config, source, model_config, [data, *([held_out] if held_out else [])], answer)
    tile_length = 0 if config.compile else config.tile_length
    whole = WHOLE_RATE if task is None else HEAD_RATE
    return Run(
        config=config,
        folder=folder,
        precision=precision,
        dtype=dtype_named(precision),
        tiling=Tiling.of(tile_length, gradient_checkpointing=config.gradient_checkpointing),
        arguments=arguments,
        learning_rate=config.learning_rate,
        update_learning_rate=config.update_learning_rate or UPDATE_RATE * config.learning_rate,
        modules_to_save_learning_rate=config.modules_to_save_learning_rate or whole * config.learning_rate,
        adapter=adapter,
        begun=begun,
        source=source,
        model_config=model_config,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        rewards=rewards,
        answer=answer,
        seer=seer.used,
        made_of=_made_of(begun, data, held_out)
        | reward_digests(config.reward)
        | {STEP_EXAMPLES: config.batch_size * config.gradient_accumulation * processes.count},
        processes=processes,
        sharded=sharded,
        on_host=on_host,
    )


def _check_schedule(config: TrainConfig) -> None:
    known = config.trl.get("lr_scheduler_kwargs") or {}
    if config.schedule == "warmup_stable_decay" and "num_decay_steps" not in known:
        raise ConfigError(
            "schedule warmup_stable_decay needs to know when the decay begins: set num_decay_steps in the option "
            "lr_scheduler_kwargs of trl, such as --trl 'lr_scheduler_kwargs={num_decay_steps: 100}'"
        )


def _adapter_config(config: TrainConfig) -> OsoraConfig:
    return OsoraConfig(
        vectors=config.vectors,
        update_rank=config.update_rank,
        target_modules=_names(config.target_modules),
        exclude_modules=_names(config.exclude_modules),
        modules_to_save=config.modules_to_save,
    )


def _check_begun(config: TrainConfig, adapter: str) -> None:
    """Refuse options that say what an adapter is, where there is one already."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    kinds = ("vectors", "update_rank", "target_modules", "exclude_modules")
    given = [n for n in kinds if getattr(config, n) != defaults[n]]
    if given or config.modules_to_save:
        names = " and ".join([*given, *(["modules_to_save"] if config.modules_to_save else [])])
        raise ConfigError(
            f"{adapter} is an adapter, whose config says what is trained: leave out {names}, or give its base as the "
            "model to begin anew"
        )


def _made_of(begun: str | None, data: Prepared, held_out: Prepared | None) -> dict[str, str]:
    """Return hashes of what determines a run besides its configuration and its base, by what a message calls it."""
    found = {"the training data (or its tokenizer)": data.digest()}
    if held_out is not None:
        found["the evaluation data (or its tokenizer)"] = held_out.digest()
    if begun is not None:
        found["the adapter that is trained on"] = file_digest(local_folder(begun) / f"{ADAPTER_STEM}.safetensors")
    return found


def _names(names: list[str] | None) -> list[str] | str | None:
    """Return names, or the single regular expression among them, as PEFT tells them apart."""
    if names and len(names) == 1 and re.search(r"[^\w.-]", names[0]):
        return names[0]
    return names


def _task(config: TrainConfig, source: str, model_config: PreTrainedConfig) -> str | None:
    """Return what the model is made for, if that is what the method trains.

    Raises:
        CheckpointError: It is not, with the method that is for it.
    """
    task, wanted = task_of(model_config), METHODS[config.method].tasks
    if task in wanted:
        if task is None:
            require_language_model(model_config, source, "qosora train")
        return task
    if task is None:
        made = " --task reward" if wanted == (REWARD,) else " --labels NAME NAME ..."
        raise CheckpointError(
            f"{source} is no {'model of rewards' if wanted == (REWARD,) else 'classifier'}, which method "
            f"{config.method} trains; make one of the original weights: qosora quantize SRC OUT{made}"
        )
    fitting = next(name for name, method in METHODS.items() if task in method.tasks)
    raise CheckpointError(f"{source} is made for {task}, which is trained with method {fitting}, not {config.method}")


class _Seers:
    """Makes what takes images once, when there are some.

    Attributes:
        used: What was made.
    """

    def __init__(self, config: TrainConfig, source: str, model_config: PreTrainedConfig, dtype: torch.dtype) -> None:
        self._config, self._source, self._model, self._dtype = config, source, model_config, dtype
        self.used: Seer | None = None

    def of(self, records: Records) -> Seer | None:
        """Return it for some records; None where they have no images, or the model takes none.

        Raises:
            ConfigError: An option that does not go with images.
            CheckpointError: The base has no processor of images.
        """
        if not records.seen or not sees(self._model):
            return None
        if self._config.packing:
            raise ConfigError("packing does not go with images; leave it out")
        if self.used is None:
            self.used = seer_of(
                self._source,
                self._model.get_text_config().vocab_size,
                completion_only=self._config.completion_only is not False,
                dtype=self._dtype,
                trust_remote_code=self._config.trust_remote_code,
            )
        return self.used


def _prepared(
    config: TrainConfig,
    source: str,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    seer: _Seers,
) -> tuple[Prepared, Prepared | None]:
    """Return the training and evaluation examples."""
    stops = _stop_ids(source)
    task = task_of(model_config)
    kind: dict[str, Any] = {"classes": model_config.label2id} if task in (TEXTS, TAGS) else {"as_pairs": task == REWARD}
    # Only packing that cuts may be told of cuts; the others split what is too long
    cut = config.max_length if config.trl.get("packing_strategy", "bfd") == "bfd" or not config.packing else None

    def read(*, held_out: bool, limit: int | None, max_length: int | None) -> Prepared:
        records = records_of(config, held_out=held_out, limit=limit, form="tags" if task == TAGS else None)
        only = config.completion_only
        kind["seer"] = seer.of(records)
        return prepare(records, tokenizer, max_length=max_length, completion_only=only, stop_ids=stops, **kind)

    data = read(held_out=False, limit=config.limit, max_length=cut)
    if config.method == "kto":  # TRL takes them as they come, and all that are good often come first
        data = replace(data, dataset=data.dataset.shuffle(seed=config.seed))
    if config.eval_data is None:
        return data, None
    return data, read(held_out=True, limit=config.eval_limit, max_length=config.max_length)


def records_of(config: TrainConfig, *, held_out: bool, limit: int | None, form: str | None = None) -> Records:
    """Return what a run is trained on, or evaluated on, in the form of its method or another.

    Raises:
        DataError: If it cannot be used.
    """
    source, split = config.data, config.data_split
    if held_out and config.eval_data is not None:
        source = config.eval_data
        split = split_to_measure(source, config.eval_split)
    columns = Columns(
        config.prompt_column, config.completion_column, config.messages_column, config.text_column, config.label_column
    )
    form = form or METHODS[config.method].form
    return load_records(source, form=form, split=split, columns=columns, chat=config.chat, limit=limit)


def _pad_within(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> None:
    """Have a tokenizer and a model's configuration pad with the same token, which the model has."""
    if not hasattr(model_config.get_text_config(), "vocab_size"):
        raise CheckpointError(
            f"{model_class_of(model_config).__name__} has no table of tokens, as it hashes characters: train it from "
            "Python, with transformers' Trainer"
        )
    pad_within(tokenizer, model_config.get_text_config().vocab_size)
    if model_config.get_text_config().pad_token_id is None:  # by which classifiers find where a text ends
        model_config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _stop_ids(source: str) -> list[int]:
    try:
        ids = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # a base without generation_config.json
        return []
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _check_fit(
    config: TrainConfig, source: str, model_config: PreTrainedConfig, data: list[Prepared], answer: int
) -> None:
    """Refuse ids and lengths that the model has no embedding for: both end in an index error deep inside."""
    model = model_config.get_text_config()
    examples = [example for d in data for example in d.tokenized.examples]
    refuse_foreign_tokens((e.input_ids for e in examples), model.vocab_size, source)
    longest = max(len(e.input_ids) for e in examples)
    positions = most_positions(model_config)
    if positions is None or longest + answer <= positions:
        return
    if answer:
        raise ConfigError(
            f"a prompt has {longest} tokens, with an answer of max_completion_length {answer} it may have "
            f"{longest + answer}, but the model takes {positions}; set max_completion_length to at most "
            f"{max(positions - longest, 0)}, or leave out long prompts"
        )
    raise ConfigError(
        f"max_length {config.max_length} lets examples have {longest} tokens, but the model takes {positions}; "
        f"set max_length to at most {positions}"
    )
