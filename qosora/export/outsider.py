"""Someone else's program: loads a checkpoint, or a LoRA onto one, with transformers and PEFT, and writes its logits.

    python -I outsider.py MODEL INPUTS LOGITS [--adapter LORA] [--trust-remote-code]

It runs in a process of its own, where qosora cannot be imported even if it is installed: what it computes is what
anyone will get. So this file imports nothing of qosora.

Products are in float32, one module at a time, whatever the weights' dtype: that is what differs between two exports,
not the arithmetic, and no float32 copy of a model is made.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["compute_in_float32", "logits"]


class _Refuse:
    """Finds nothing, and refuses qosora."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if name.partition(".")[0] == "qosora":
            raise ModuleNotFoundError(f"{name} is not to be imported here")


def compute_in_float32(model: nn.Module) -> None:
    """Have each module of a 16-bit model compute in float32, on a copy of its parameters that it drops afterwards."""
    for module in model.modules():
        narrow = [p for p in module.parameters(recurse=False) if p.dtype in (torch.float16, torch.bfloat16)]
        if narrow:
            _widen_in_forward(module, narrow)


def _widen_in_forward(module: nn.Module, parameters: list[nn.Parameter]) -> None:
    stored = [p.data for p in parameters]

    def widen(*_: Any) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        for parameter, data in zip(parameters, stored, strict=True):
            parameter.data = data

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore)


@torch.no_grad()
def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Return what a model makes of some inputs, one after another, unpadded: (tokens or inputs, numbers), float32.

    Args:
        model: A language model, or one of another kind: of one without a head, the last hidden states are returned.
        **inputs: What it is called with, each with a row for every input; `attention_mask` is 0 where one has ended.
    """
    model.eval().config.use_cache = False
    found = []
    for row in range(len(next(iter(inputs.values())))):
        given = {name: values[row : row + 1] for name, values in inputs.items()}
        if (mask := given.get("attention_mask")) is not None:
            given |= {name: given[name][:, : int(mask.sum())] for name in ("input_ids", "attention_mask")}
        output = model(**given)
        numbers = output.logits if "logits" in output else output[0]
        found.append(numbers.reshape(-1, numbers.shape[-1]).float())
    return torch.cat(found)


def _load(source: str, adapter: str | None, trust_remote_code: bool, kind: str | None, labels: int | None) -> Any:
    import transformers

    path = Path(source)
    gguf: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model_class = transformers.AutoModelForCausalLM
    if not gguf and not trust_remote_code:
        config = transformers.AutoConfig.from_pretrained(source)
        model_class = getattr(transformers, (config.architectures or [""])[0], model_class)
    if kind is not None:  # another than the checkpoint is of: its head is the adapter's
        model_class, gguf = getattr(transformers, kind), {**gguf, "num_labels": labels}
    model, info = model_class.from_pretrained(
        path.parent if path.suffix == ".gguf" else source,
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **gguf,
    )
    if adapter is None:
        if problems := {key: sorted(map(str, value))[:3] for key, value in info.items() if value}:
            sys.exit(f"transformers does not load it whole: {problems}")
        return model
    from peft import PeftModel

    warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
    adapted = PeftModel.from_pretrained(model, adapter)
    # Onto stacked experts PEFT adds the LoRA itself, in the model's dtype, not module by module.
    return adapted.float() if adapted.peft_config["default"].target_parameters else adapted


def main() -> None:
    """Load, compute, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("inputs")
    parser.add_argument("logits")
    parser.add_argument("--adapter")
    parser.add_argument("--kind")
    parser.add_argument("--labels", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    sys.meta_path.insert(0, _Refuse())
    model = _load(args.model, args.adapter, args.trust_remote_code, args.kind, args.labels)
    compute_in_float32(model)
    save_file({"logits": logits(model, **load_file(args.inputs)).contiguous()}, args.logits)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # whatever goes wrong here is what the user is told
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
