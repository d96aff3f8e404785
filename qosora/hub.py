"""Bases, adapters and exports on the hub, each with a card that says what it is, what it is made of, and its figures.

What goes there is what the folder's manifest lists, whole or not at all: no checkpoints, no paths of this machine. An
adapter names its base as others can get it. The folder itself is not changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qosora import __version__
from qosora.checkpoints import (
    ADAPTER_CONFIG,
    CONFIG_NAME,
    MANIFEST_NAME,
    adapter_config,
    expanded,
    hashed,
    quantization_in,
    read_json,
    read_manifest,
    verify_files,
)
from qosora.errors import CheckpointError, ConfigError, QosoraError, first_line
from qosora.training import RESULT, RUN_CONFIG

__all__ = ["push"]

CARD = "README.md"
#: What a run's folder has besides the adapter; result.json and the configuration name places of this machine.
_OF_THE_RUN = {RESULT, RUN_CONFIG, "made_of.json", "report.html"}
_KINDS = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".gguf", ""}


def push(
    folder: str | Path, repo: str, *, base: str | None = None, private: bool | None = None, message: str | None = None
) -> str:
    """Put a base, an adapter or an export on the hub.

    Args:
        folder: As `quantize`, `train`, `save_pretrained` or `export` wrote it.
        repo: Where to, OWNER/NAME; made if it is not there.
        base: Of an adapter: where others get its base, OWNER/NAME; by default what its config names, if that is one.
        private: Whether a repository that is made is private; by default as the owner's settings have it.
        message: Of the commit.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: The folder is none of qosora's, or is damaged.
        ConfigError: No such name can be, or an adapter whose base nobody else has.
        QosoraError: The hub refuses, or cannot be reached.
    """
    place = Path(expanded(folder))
    for name in filter(None, (repo, base)):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(f"{name!r} is no name of a repository, OWNER/NAME: {first_line(error)}") from error
    files = _files(place)
    if problems := verify_files(place):
        raise CheckpointError(f"{place}: {problems[0]}; get another copy, or make it anew")
    with TemporaryDirectory(prefix="qosora-") as scratch:
        staged = Path(scratch)
        for name in files:
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(place / name, target)
        if _is_adapter(place):
            _name_base(place, staged / ADAPTER_CONFIG, base)
        elif base is not None:
            raise ConfigError(f"{place} is no adapter, so it has no base to be named")
        _replace(staged / CARD, card(place, staged))
        if (place / MANIFEST_NAME).is_file():
            manifest = {**read_manifest(place), "files": hashed(staged, [*files, CARD])}
            _replace(staged / MANIFEST_NAME, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        api = HfApi()
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=staged, commit_message=message or f"qosora {__version__}")
        except (HfHubHTTPError, OSError) as error:
            hint = "; log in with `hf auth login`" if "401" in str(error) else ""
            raise QosoraError(f"the hub does not take {repo}: {first_line(error)}{hint}") from error
    return str(address)


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source.resolve(), target)
    except OSError:  # Windows asks for a privilege
        shutil.copyfile(source, target)


def _replace(file: Path, text: str) -> None:
    """Write a file in place of a link: what the link leads to stays."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


def _files(folder: Path) -> list[str]:
    """Return what is to go, without the manifest and the card."""
    names: Any = read_manifest(folder).get("files")
    if not names:
        if not (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(f"{folder} holds no base, adapter or export; name a folder that qosora wrote")
        names = [
            path.relative_to(folder).as_posix()
            for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*"))
            if path.is_file() and path.suffix in _KINDS and not path.name.startswith(".")
        ]
    return sorted(set(names) - _OF_THE_RUN - {CARD, MANIFEST_NAME})


def _is_adapter(folder: Path) -> bool:
    """Say whether there is an adapter of qosora's, and not a LoRA."""
    return (folder / ADAPTER_CONFIG).is_file() and "base_fingerprint" in read_json(folder / ADAPTER_CONFIG)


def _name_base(folder: Path, file: Path, base: str | None) -> None:
    config = read_json(folder / ADAPTER_CONFIG)
    named = str(config.get("base_model_name_or_path") or "")
    if base is None and (not named or named.split("/")[0] in (os.curdir, os.pardir) or Path(named).is_absolute()):
        raise ConfigError(
            f"the base of {folder} is {named or 'not named'}, which nobody else has; put it on the hub, too, and name "
            "it: --base OWNER/NAME"
        )
    _replace(file, json.dumps({**config, "base_model_name_or_path": base or named}, indent=2, sort_keys=True) + "\n")


# ---- the card


def card(folder: Path, staged: Path) -> str:
    """Return the card of a folder.

    Args:
        folder: As it is here.
        staged: As it goes to the hub, where an adapter names its base for others.
    """
    if _is_adapter(staged):
        head, body = _of_adapter(folder, staged)
    elif (staged / CONFIG_NAME).is_file() and quantization_in(read_json(staged / CONFIG_NAME)) is not None:
        head, body = _of_base(folder)
    else:
        head, body = _of_export(folder)
    own, rest = _parted(folder / CARD)
    if "[More Information Needed]" in rest:  # PEFT's form, which nobody has filled in
        rest = ""
    kept = {key: value for key, value in own.items() if key in ("license", "license_name", "license_link", "language")}
    text = yaml.safe_dump({**kept, **head}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n{body}" + (f"\n---\n\n{rest.lstrip()}" if rest.strip() else "")


def _parted(file: Path) -> tuple[dict[str, Any], str]:
    """Return a card's data and its text."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if text.startswith("---\n") and (end := text.find("\n---", 4)) > 0:
        try:
            data = yaml.safe_load(text[4:end])
        except yaml.YAMLError:
            return {}, text
        if isinstance(data, dict):
            return data, text[end + 4 :]
    return {}, text


def _of_adapter(folder: Path, staged: Path) -> tuple[dict[str, Any], str]:
    config = adapter_config(staged)
    base = str(config.base_model_name_or_path)
    result = read_json(folder / RESULT) if (folder / RESULT).is_file() else {}
    run = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8")) if (folder / RUN_CONFIG).is_file() else {}
    head: dict[str, Any] = {
        "library_name": "peft",
        "base_model": base,
        "tags": ["qosora", "osora", *([run["method"]] if "method" in run else [])],
    }
    if isinstance(run.get("data"), str) and _on_hub(run["data"]):
        head["datasets"] = [run["data"].partition(":")[0]]
    lines = [
        f"An OSoRA adapter of {base}, a base in 4 bits: the vectors of its layers, trained with qosora {__version__}.",
        "",
        "```python",
        "from peft import PeftModel",
        "from qosora import load_base",
        "",
        f'model = PeftModel.from_pretrained(load_base("{base}"), "THIS_REPOSITORY")',
        "```",
    ]
    if run:
        lines += ["", "## Training", "", *_table(_training(run, result))]
    if figures := _figures(result):
        lines += ["", "## Figures", "", "| | before | after |", "|---|---|---|", *figures]
    return head, "\n".join(lines) + "\n"


def _on_hub(data: str) -> bool:
    """Say whether data are a hub data set's: no file here, and no name of one."""
    return not Path(data).expanduser().exists() and Path(data.partition(":")[0]).suffix == ""


def _training(run: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card says of a run, files by their names alone."""
    data = {key: run[key] for key in ("data", "eval_data") if run.get(key)}
    said: dict[str, Any] = {"method": run.get("method", "sft")}
    said |= {key.replace("_", " "): value if _on_hub(value) else Path(value).name for key, value in data.items()}
    counts = ("examples", "supervised_tokens", "steps", "trained_parameters")
    said |= {key: f"{result[key]:,}" for key in counts if key in result}
    said["examples a step"] = run["batch_size"] * run["gradient_accumulation"] * result.get("processes", 1)
    names = ("learning_rate", "schedule", "max_length", "packing", "vectors", "update_rank", "seed")
    return said | {key: run[key] for key in names if key in run} | {"precision": result.get("precision")}


def _figures(result: Mapping[str, Any]) -> list[str]:
    rows = {
        "evaluation loss": (result.get("eval_loss_before"), result.get("eval_loss_after")),
        **{f"{name} (first and last tenth of the steps)": pair for name, pair in result.get("figures", {}).items()},
    }
    return [
        f"| {name} | {before:.4f} | {after:.4f} |"
        for name, (before, after) in rows.items()
        if before is not None and after is not None
    ]


def _of_base(folder: Path) -> tuple[dict[str, Any], str]:
    config, manifest = quantization_in(read_json(folder / CONFIG_NAME)) or {}, read_manifest(folder)
    source = str(manifest.get("source") or "")
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["qosora", "osora", "4-bit"]}
    if source and not source.startswith("."):
        head |= {"base_model": source, "base_model_relation": "quantized"}
    said = {key: config[key] for key in ("rank", "quant_type", "scale", "embeddings") if config.get(key) is not None}
    if layers := manifest.get("layers"):
        said["relative error of the weights"] = f"{fmean(layer['error'] for layer in layers):.4f}"
        said["of plain NF4"] = f"{fmean(layer['nf4_error'] for layer in layers):.4f}"
        said["bits a parameter"] = f"{fmean(layer['bits_per_parameter'] for layer in layers):.2f}"
    lines = [
        f"A base for qosora {__version__}: {source.removeprefix('./') or 'a model'}, each matrix of it a residual in "
        "4 bits and singular vectors.",
        "",
        "```sh",
        "qosora train --model THIS_REPOSITORY --data train.jsonl --output-dir my-adapter",
        "```",
        "",
        *_table(said),
    ]
    return head, "\n".join(lines) + "\n"


def _of_export(folder: Path) -> tuple[dict[str, Any], str]:
    manifest = read_manifest(folder)
    if not {"base", "adapters"} <= manifest.keys():
        raise CheckpointError(f"{folder} holds no base, adapter or export; name a folder that qosora wrote")
    own, _ = _parted(folder / CARD)
    head: dict[str, Any] = {"tags": ["qosora", *(["gguf"] if "gguf" in manifest else [])]}
    lora = (folder / ADAPTER_CONFIG).is_file()
    head["library_name"] = "peft" if lora else "gguf" if "gguf" in manifest else "transformers"
    if lora and "base_model" in own:
        head["base_model"] = own["base_model"]
    adapters = ", ".join(
        f"{name.removeprefix('./')}" + f" (weight {weight:g})" * (weight != 1)
        for name, weight in manifest["adapters"].items()
    )
    what = "A LoRA of what was trained" if lora else "Merged weights"
    lines = [
        f"{what}: the adapter {adapters or '(none)'} on the base {str(manifest['base']).removeprefix('./')}, exported "
        f"by qosora {__version__}. It loads without qosora.",
        "",
        *_table({key: manifest[key] for key in ("quant", "original") if manifest.get(key)}),
    ]
    if found := manifest.get("verification"):
        lines += ["", "Compared with what it was made of:", "", *_table(found)]
    return head, "\n".join(lines) + "\n"


def _table(rows: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| {key.replace('_', ' ')} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for key, value in rows.items()
        if value is not None
    ]
    return ["| | |", "|---|---|", *lines] if lines else []
