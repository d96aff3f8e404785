"""`TrainConfig`: all that a training run needs to know, from a YAML file, from flags, or from Python.

Plain data, checked at once: nothing heavy is imported here, so the command line can make its flags of the fields (each
carries `metadata["help"]`, some `metadata["choices"]`) and refuse a bad configuration before any model is touched.
"""

# ruff: noqa: RUF009  (`_option` returns dataclasses.field)
from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from qosora.errors import ConfigError, near_miss

__all__ = ["TrainConfig"]

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay")
OPTIMIZER_NAMES = ("paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit")
#: Examples on the device at once by default; and what stands for those that the plan fits.
BATCH_SIZE, AUTO = 4, 0
#: Files of a run's folder: its configuration, and a line for each logged step.
RUN_CONFIG, METRICS = "train_config.yaml", "metrics.jsonl"
#: Fields as they were called before there were methods.
_EARLIER_NAMES = {"sft": "trl"}
STRATEGIES = ("ddp", "fsdp")
#: Where a base can be.
PLACES = ("gpu", "host")
#: Ways of learning, and what their logs show success by, the first for the progress bar.
FIGURES = {
    "sft": ("loss",),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "kto": ("loss", "rewards/margins"),
    "orpo": ("loss", "rewards/accuracies", "rewards/margins"),
    "grpo": ("reward",),
    "reward": ("loss", "accuracy", "margin"),
    "classify": ("loss", "accuracy", "f1"),
}
#: Learning rates of the vectors by default: measured for examples (benchmarks/quality), a tenth of it for the others.
LEARNING_RATES = {"sft": 1e-2, "dpo": 1e-3, "kto": 1e-3, "orpo": 1e-3, "grpo": 1e-3, "reward": 1e-2, "classify": 1e-2}
#: Learning rate of whole matrices by default, as a part of the vectors': an embedding has learned, a head is new.
WHOLE_RATE, HEAD_RATE = 0.01, 0.1
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field.

    `least` and `above` bound it, and with `auto` it may also be "auto", which is kept as `AUTO`; `live` says that
    resuming may change it, `path` that it may lie elsewhere by then: its content is compared.
    """
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _FieldErrors(ConfigError):
    """Problems of a configuration, each with the name of its field."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__([message for _, message in found])
        self.found = found


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The fields' help texts are the documentation: `qosora train --help`.

    Raises:
        ConfigError: With every problem that the values have.

    Example:
        >>> config = TrainConfig(model="llama-2-7b-qosora", data="train.jsonl", output_dir="run", epochs=3)
    """

    model: str = _option(
        MISSING,
        "qosora base (folder or hub id, as `qosora quantize` or save_pretrained wrote it), or an adapter to go on with",
        path=True,
    )
    data: str = _option(
        MISSING, "training data: .jsonl, .json, .csv or .parquet file, or hub data set (NAME[:CONFIG])", path=True
    )
    output_dir: str = _option(MISSING, "folder for the adapter, its checkpoints and metrics.jsonl", live=True)
    method: str = _option(
        "sft",
        "learn from examples (sft), pairs of a better and a worse answer (dpo, orpo), answers that are good or not "
        "(kto), or rewards of the model's own answers (grpo); for models of other kinds: the classes of texts or words "
        "(classify), or which of two answers is better (reward)",
        choices=tuple(FIGURES),
    )
    eval_data: str | None = _option(None, "held-out data, evaluated before and after training", path=True)
    data_split: str | None = _option(None, "split of a hub data set [train]; slices such as train[:1000] work")
    eval_split: str | None = _option(None, "split of a hub data set for evaluation [test]")
    limit: int | None = _option(None, "use the first N training examples only", least=1)
    eval_limit: int | None = _option(None, "use the first N evaluation examples only", least=1)

    prompt_column: str | None = _option(None, "column of the prompt, where it is not called prompt")
    completion_column: str | None = _option(None, "column of the completion, where it is not called completion")
    messages_column: str | None = _option(None, "column of the chat messages, where it is not called messages")
    text_column: str | None = _option(
        None, "column of plain text, where it is not called text; classify: of the text, or of its words (tokens)"
    )
    label_column: str | None = _option(
        None, "classify: column of the class, where it is not called label, or of the words' classes (tags)"
    )
    chat: bool = _option(False, "wrap prompts and what answers them into the model's chat template")
    completion_only: bool | None = _option(
        None, "train on completions (in chats: on the assistant's turns) only [yes, except for plain text]"
    )
    max_length: int = _option(1024, "cut examples to this many tokens; the length of packed sequences", least=2)
    beta: float | None = _option(
        None, "dpo, kto, orpo, grpo: how much the model is held to where it began [0.1; grpo 0]", least=0
    )
    reward: list[str] = _option(
        [],
        "grpo: what an answer is worth: FILE.py:FUNCTION, called as TRL does; or exact, number, regex:PATTERN, think, "
        "which compare it with the column answer (exact:COLUMN). Rewards are added",
    )
    num_generations: int | None = _option(
        None,
        "grpo: answers to each prompt, compared with each other [8, or all of a step where they are fewer]",
        least=2,
    )
    max_completion_length: int | None = _option(None, "grpo: tokens of an answer at most [256]", least=1)
    packing: bool = _option(False, "pack several examples into each sequence; flash attention keeps them cheap to part")

    epochs: float = _option(1.0, "passes over the data, where max_steps does not say otherwise", above=0)
    max_steps: int | None = _option(None, "optimizer steps in all", least=1)
    batch_size: int = _option(
        BATCH_SIZE,
        "examples on the device at once; auto: the most that the plan fits, of a step of "
        f"{BATCH_SIZE} gradient_accumulation",
        least=1,
        auto=True,
        live=True,
    )
    gradient_accumulation: int = _option(1, "batches per optimizer step", least=1, live=True)
    learning_rate: float = _option(
        None, "of the vectors: about 20 times what LoRA takes [1e-2; dpo, kto, orpo, grpo: 1e-3]", above=0
    )
    update_learning_rate: float | None = _option(None, "of an update's A and B [0.4 learning_rate]", above=0)
    modules_to_save_learning_rate: float | None = _option(
        None, "of modules_to_save, whole matrices [learning_rate / 100; of a classifier's head: / 10]", above=0
    )
    schedule: str = _option("cosine", "course of the learning rate", choices=SCHEDULES)
    warmup_ratio: float = _option(0.03, "part of the steps in which the learning rate rises", least=0, below=1)
    max_grad_norm: float = _option(1.0, "clip the gradient to this norm; 0 does not clip", least=0)
    weight_decay: float = _option(0.0, "decay towards zero, which would erase pre-trained directions", least=0)
    optimizer: str = _option("paged_adamw_32bit", "optimizer, on packed vectors", choices=OPTIMIZER_NAMES)
    seed: int = _option(0, "of the order of the data and of dropout, if the model has any", least=0)

    vectors: str = _option("both", "vectors to train", choices=("both", "s", "o"))
    update_rank: int = _option(0, "also train a matrix of this rank beside each layer, as LoRA does", least=0)
    target_modules: list[str] | None = _option(None, "decomposed layers to adapt: names or one regular expression")
    exclude_modules: list[str] | None = _option(None, "layers to leave out: names or one regular expression")
    modules_to_save: list[str] | None = _option(None, "other modules to train and save whole, such as lm_head")

    precision: str = _option(
        "auto", "dtype of activations [bf16 or else fp16 on a GPU, fp32 on a CPU]", choices=PRECISIONS
    )
    gradient_checkpointing: bool = _option(True, "recompute activations in backward instead of keeping them")
    strategy: str = _option(
        "ddp",
        "in several processes: each GPU holds the whole base (ddp), or its part of it (fsdp)",
        choices=STRATEGIES,
        live=True,
    )
    base_on: str = _option(
        "gpu",
        "where the base is: host memory, from which each layer comes to the GPU as it is needed, takes less of the GPU",
        choices=PLACES,
        live=True,
    )
    activation_offloading: bool = _option(False, "keep activations in host memory (CUDA)")
    tile_length: int | None = _option(
        None,
        "compute MLPs and norms in tiles of N tokens, and again in backward, to save memory; 0 does not "
        "[4096 with gradient_checkpointing; without it, norms only]",
        least=0,
    )
    compile: bool = _option(
        False, "compile the decoder's layers with torch.compile, without tiles; `plan` knows nothing of it"
    )
    use_liger: bool = _option(False, "use Liger kernels in the layers; needs the package liger-kernel")
    attn_implementation: str | None = _option(None, "attention: sdpa, eager, flash_attention_2, ... [transformers']")
    trust_remote_code: bool = _option(False, "run Python code that comes with the checkpoint")

    save_steps: int = _option(100, "steps between checkpoints; 0 saves none", least=0, live=True)
    save_total_limit: int | None = _option(2, "checkpoints to keep", least=1, live=True)
    eval_steps: int | None = _option(None, "steps between evaluations [before and after only]", least=1, live=True)
    eval_batch_size: int = _option(8, "evaluation examples on the device at once", least=1, live=True)
    logging_steps: int = _option(1, "steps between lines of metrics.jsonl", least=1, live=True)
    report_to: list[str] = _option([], "also log to: trackio, tensorboard, wandb, mlflow, ...", live=True)
    progress: bool = _option(True, "show a progress bar", live=True)
    resume: bool = _option(False, "go on from the last checkpoint in output_dir, if there is one", live=True)
    overwrite: bool = _option(False, "replace an earlier run in output_dir", live=True)
    trl: dict[str, Any] = _option({}, "any other option of TRL's configuration (SFTConfig, DPOConfig, ...), by name")

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if values["learning_rate"] is None:
            values["learning_rate"] = LEARNING_RATES.get(str(self.method), LEARNING_RATES["sft"])
        coerced, problems = _check(values)
        if problems:
            raise _FieldErrors(problems)
        for name, value in coerced.items():
            object.__setattr__(self, name, value)

    @classmethod
    def load(cls, yaml_path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """Return the config of a YAML file and flags; flags win.

        Args:
            yaml_path: A YAML mapping of field names to values. Where it is the one in a run's folder and `resume` is
                among the flags, the run is the one in that folder, wherever this is called.
            overrides: Values by field name, such as the flags that were given.

        Raises:
            ConfigError: With every problem; those of the file name its line.
        """
        overrides = dict(overrides or {})
        from_file, lines, problems = _read_yaml(Path(yaml_path).expanduser()) if yaml_path is not None else ({}, {}, [])
        if overrides.get("resume") and yaml_path is not None and "output_dir" not in overrides:
            overrides |= _of_that_run(Path(yaml_path).expanduser(), from_file)
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for source, where in ((from_file, lines), (overrides, {})):
            for key, value in source.items():
                name = _EARLIER_NAMES.get(key, key)
                if name in known:
                    values[name] = value
                else:
                    problems.append(where.get(name, "") + f"unknown option {name!r}{near_miss(name, known)}")
        required = {f.name: f.metadata["help"] for f in fields(cls) if f.default is f.default_factory is MISSING}
        missing = [name for name in required if name not in values]
        values |= dict.fromkeys(missing, "missing")  # so that all else is checked, too
        try:
            config = cls(**values)
        except _FieldErrors as error:
            found = error.found
            problems += [("" if name in overrides else lines.get(name, "")) + message for name, message in found]
        problems += [f"{name} is missing: {required[name]}" for name in missing]
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return a JSON schema (draft 2020-12) of a configuration file, for editors."""
        hints = get_type_hints(cls)
        properties: dict[str, Any] = {}
        for f in fields(cls):
            entry = properties[f.name] = {"description": f.metadata["help"], **_schema(hints[f.name], f.metadata)}
            if f.default is not MISSING and f.default is not None:
                entry["default"] = f.default
            elif f.default_factory is not MISSING:
                entry["default"] = f.default_factory()
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "A training run of qosora",
            "type": "object",
            "properties": properties,
            "required": [f.name for f in fields(cls) if f.default is f.default_factory is MISSING],
            "additionalProperties": False,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to_yaml(self) -> str:
        """Return all values as YAML that `load` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, whole or not at all."""
        from qosora.checkpoints import write_atomically

        write_atomically(path, self.to_yaml())

    def changed_since(self, earlier: TrainConfig) -> list[str]:
        """Return the fields in which a run differs from an earlier one such that it cannot go on from it."""

        def differs(name: str, path: bool) -> bool:
            now, before = getattr(self, name), getattr(earlier, name)
            return (now is None) != (before is None) if path else now != before

        return [
            f.name
            for f in fields(self)
            if not f.metadata.get("live") and differs(f.name, f.metadata.get("path", False))
        ]


def _of_that_run(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the folder of a run by the configuration in it, and other paths as they were where the run was begun."""
    folder = file.resolve().parent
    name = values.get("output_dir")
    if file.name != RUN_CONFIG or not isinstance(name, str) or not (folder / METRICS).is_file():
        return {}
    found = {"output_dir": str(folder)}
    if Path(name).expanduser().is_absolute():
        return found
    started = Path(str(folder).removesuffix(str(Path(name))))
    for key in ("model", "data", "eval_data"):
        value = values.get(key)
        if isinstance(value, str) and not Path(value).expanduser().exists() and (started / value).exists():
            found[key] = str(started / value)
    return found


def _check(values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the values in their fields' types, and (field, problem) for each that is wrong."""
    hints = get_type_hints(TrainConfig)
    coerced, problems = dict(values), []
    for f in fields(TrainConfig):
        if f.name not in values:
            continue
        if f.metadata.get("auto") and values[f.name] == "auto":
            coerced[f.name] = AUTO
            continue
        try:
            value = coerced[f.name] = _coerce(values[f.name], hints[f.name])
        except TypeError:
            wanted = _type_name(hints[f.name])
            problems.append((f.name, f"{f.name} must be {wanted}, got {_shown(values[f.name])}"))
            del coerced[f.name]
            continue
        if value is not None and (limits := _out_of_limits(value, f.metadata)):
            problems.append((f.name, f"{f.name} must be {limits}, got {_shown(value)}"))
    return coerced, problems + _conflicts(coerced)


def _out_of_limits(value: Any, metadata: Mapping[str, Any]) -> str | None:
    if metadata.get("auto") and value == AUTO:
        return None
    if "choices" in metadata:
        return None if value in metadata["choices"] else "one of " + ", ".join(metadata["choices"])
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    if value == "":
        return "non-empty text"
    bounds = {
        f"at least {metadata.get('least')}": "least" in metadata and value < metadata["least"],
        f"above {metadata.get('above')}": "above" in metadata and value <= metadata["above"],
        f"below {metadata.get('below')}": "below" in metadata and value >= metadata["below"],
    }
    return next((text for text, broken in bounds.items() if broken), None)


def _conflicts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is wrong with fields together."""
    get = values.get
    problems = _of_another_method(values)
    pair = ("prompt_column", "completion_column")
    if get("method") == "sft" and (get(pair[0]) is None) != (get(pair[1]) is None):
        problems.append((pair[0], "prompt_column and completion_column belong together; give both, or text_column"))
    kinds = [kind for kind in ("prompt_column", "messages_column", "text_column") if get(kind) is not None]
    if len(kinds) > 1:
        problems.append((kinds[1], f"{' and '.join(kinds)} name different data formats; give one"))
    if get("chat") and (get("messages_column") or get("text_column")):
        problems.append(
            ("chat", "chat wraps prompts and completions; it does not go with messages_column or text_column")
        )
    if get("completion_only") and get("text_column"):
        problems.append(
            ("completion_only", "completion_only needs prompts or messages, but text_column names plain text")
        )
    if get("resume") and get("overwrite"):
        problems.append(("resume", "resume keeps an earlier run and overwrite removes it; give one"))
    if get("compile") and get("tile_length"):
        problems.append(("compile", "compiled layers are not computed in tiles; give compile or tile_length"))
    needs = [n for n in ("eval_steps", "eval_split", "eval_limit") if get(n) is not None and not get("eval_data")]
    problems += [(name, f"{name} needs eval_data") for name in needs]
    return problems


#: Options that only some methods have a use for.
_ONLY = {
    "completion_only": ("sft",), "packing": ("sft",), "messages_column": ("sft",), "text_column": ("sft", "classify"),
    "label_column": ("classify",), "prompt_column": ("sft", "dpo", "kto", "orpo", "grpo", "reward"),
    "chat": ("sft", "dpo", "kto", "orpo", "grpo", "reward"),
    "completion_column": ("sft", "kto"), "beta": ("dpo", "kto", "orpo", "grpo"), "reward": ("grpo",),
    "num_generations": ("grpo",), "max_completion_length": ("grpo",),
    "activation_offloading": ("sft", "dpo", "kto", "reward"),
}  # fmt: skip


def _of_another_method(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    method = values.get("method")
    problems = [
        (name, f"{name} is for method {' or '.join(methods)}, and this is {method}")
        for name, methods in _ONLY.items()
        if method in FIGURES and method not in methods and values.get(name) not in (None, False, [])
    ]
    if method == "grpo" and values.get("reward") == []:
        problems.append(("reward", "method grpo needs a reward: FILE.py:FUNCTION, exact, number, regex:PATTERN, think"))
    return problems


def _coerce(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, where that loses nothing; YAML reads 2e-2 as text."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is list:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return list(items)
    elif get_origin(hint) is dict:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise TypeError from None
    elif type(value) is hint:
        return value
    elif hint is str and isinstance(value, Path):
        return str(value)
    raise TypeError


def _schema(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of what `_coerce` and `_out_of_limits` take."""
    if get_origin(hint) in (Union, types.UnionType):
        inner, _ = get_args(hint)
        return {"anyOf": [_schema(inner, metadata), {"type": "null"}]}
    if get_origin(hint) is list:
        text = {"type": "string"}
        return {"anyOf": [{"type": "array", "items": text}, text]}
    if get_origin(hint) is dict:
        return {"type": "object"}
    found: dict[str, Any] = {"type": {int: "integer", float: "number", bool: "boolean"}.get(hint, "string")}
    words = {"least": "minimum", "above": "exclusiveMinimum", "below": "exclusiveMaximum", "choices": "enum"}
    found |= {word: metadata[ours] for ours, word in words.items() if ours in metadata}
    if "enum" in found:
        found["enum"] = list(found["enum"])
    if hint is str and "choices" not in metadata:
        found["minLength"] = 1
    return {"anyOf": [found, {"const": "auto"}]} if metadata.get("auto") else found


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in get_args(hint))
    return names.get(hint) or ("a list of texts" if get_origin(hint) is list else "a mapping of names to values")


def _shown(value: object) -> str:
    """Return a value for a message; one that aliases in a YAML file made of a few lines can be megabytes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return short.repr(value)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return a YAML file's values, "FILE line N: " for each key, and problems."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, thousands of digits, too deep
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return {}, {}, []
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected lines such as `model: FOLDER`, got something else than names and values")
    lines: dict[str, str] = {}
    problems = []
    for key, _ in node.value:
        where = f"{path} line {key.start_mark.line + 1}: "
        if key.value in lines:
            problems.append(f"{where}{key.value} is given a second time")
        lines[key.value] = where
    return values, lines, problems
