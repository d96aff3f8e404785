"""What exports are held against, from the files and the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    Trained,
    logits,
)
from transformers import AutoModelForCausalLM

from qosora.checkpoints.reader import CheckpointReader
from qosora.decompose import nf4
from qosora.errors import CheckpointError
from qosora.export import export_merged
from qosora.layers.linear import qosora_modules


def tensors_of(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    with CheckpointReader(folder, stem) as reader:
        return {name: reader.tensor(name).clone() for name in reader.names()}


def learned(trained: Trained) -> dict[str, torch.Tensor]:
    """Return ΔW of each layer by its module name, float64, with loops over the live model's 4-bit factors."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in qosora_modules(trained.model.get_base_model()).items():
        adapter = trained.model.get_base_model().get_submodule(name.removesuffix(".base_layer"))
        s, o = (v.detach().double() for v in adapter.vectors("default"))
        U, V = (nf4.dequantize(getattr(layer.factors, part)).double() for part in ("U", "V"))
        sigma, V = layer.s.double(), V * (1 if layer.c is None else layer.c.double())
        parts = (torch.outer(o * U[k] * s[k] - U[k] * sigma[k], V[k]) for k in range(len(sigma)))
        found[name.removesuffix(".base_layer")] = torch.stack(list(parts)).sum(0)
    return found


@torch.no_grad()
def expected_logits(trained: Trained) -> torch.Tensor:
    """Return the logits of the original with ΔW added in float64; experts have no products in float64."""
    model = AutoModelForCausalLM.from_pretrained(trained.original, dtype=torch.float64).eval()
    for name, delta in learned(trained).items():
        block, _, expert = name.partition(".experts.")
        if not expert:
            weight = model.get_parameter(f"{name}.weight")
            weight += delta.T if type(model.get_submodule(name)).__name__ == "Conv1D" else delta
            continue
        index, projection = expert.split(".")
        stack = model.get_parameter(
            f"{block}.experts.{'down' if projection in ('w2', 'down_proj') else 'gate_up'}_proj"
        )
        start = len(delta) if projection in ("w3", "up_proj") else 0
        stack[int(index), start : start + len(delta)] += delta
    return logits(model.float())


def refused(
    tmp_path: Path,
    match: str,
    *args: Any,
    error: type[Exception] = CheckpointError,
    export: Any = export_merged,
    kept: bool = False,
    **kwargs: Any,
) -> None:
    """Check that an export fails with one line and leaves nothing, or what was finished where it is to be `kept`."""
    with pytest.raises(error, match=match) as info:
        export(args[0], tmp_path / "out" / "export", *args[1:], **kwargs)
    assert "\n" not in str(info.value)
    left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
    assert left == (["export.partial"] if kept else [])


def edit_tensors(file: Path, edit: Any) -> None:
    """Rewrite a safetensors file after `edit` changed its dictionary in place, and forget an adapter's hash of it."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    config = file.with_name("adapter_config.json")
    if config.exists():
        config.write_text(json.dumps({**json.loads(config.read_text()), "weights_sha256": None}))
