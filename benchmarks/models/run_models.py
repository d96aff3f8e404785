"""What can be made of every architecture of transformers: each as a tiny model, through all that qosora does.

    python benchmarks/models/run_models.py --output models.json                     # all, about 15 minutes on a core
    python benchmarks/models/run_models.py --output models.json --kinds causal --only llama gpt_oss

Stages, each a line of the result: build, quantize, load (equal to what `from_pretrained` makes of the same weights),
train (gradients of all vectors, with checkpointing and without; of language models the loss that `qosora train`
computes, equal to that of their logits), adapter (saved and loaded), export (merged, in
transformers' own class, onto the base and onto the original), lora (in PEFT, equal to the latter). A stage that ends
with a `QosoraError` is refused, with its line; anything else is a failure. `share` is the part of the entries of all
matrices, but embeddings and head, that is decomposed. Each model has a process of its own; what the output has already
is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import KINDS, architectures, inputs_of, tiny_model
from torch import nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import commit, device, versions

from qosora import OsoraConfig, QosoraConfig
from qosora.adapter import OsoraLayer
from qosora.base import load_base, load_model, quantize
from qosora.compat.trl import add_fused_lm_head
from qosora.errors import QosoraError, first_line
from qosora.export import export_lora, export_merged
from qosora.layers import QosoraLinear
from qosora.training.own_logits import keep_own_logits

#: Of PEFT, by kind of model.
TASKS = {
    "causal": "CAUSAL_LM",
    "classifier": "SEQ_CLS",
    "tagger": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "speech": None,
    "vision": None,
}
LIMIT_SECONDS, LIMIT_BYTES = 120, 12 << 30


def stages(kind: str, model_type: str, class_name: str, folder: Path, report: Any) -> None:
    """Take one model through everything; `report` is called with each stage's name and values."""
    model = tiny_model(model_type, class_name)
    inputs = inputs_of(model)
    expected = output(model, inputs)
    if not torch.isfinite(expected).all():
        raise ValueError("the tiny model's outputs are not finite")
    model.save_pretrained(folder / "source")
    report("build", parameters=sum(p.numel() for p in model.parameters()), shape=list(expected.shape))
    quantize(folder / "source", folder / "base", QosoraConfig(rank=8))
    report("quantize")
    base = load_base(folder / "base")
    whole = type(model).from_pretrained(folder / "source", quantization_config=QosoraConfig(rank=8))
    difference = relative(output(base, inputs), output(whole, inputs))
    if type(base) is not type(model) or difference > 1e-5:
        raise AssertionError(f"{type(base).__name__} differs from what from_pretrained makes by {difference:.2g}")
    report("load", share=share(base), error=relative(output(base, inputs), expected))
    adapted = get_peft_model(base, OsoraConfig(task_type=TASKS[kind]))
    gradients = trained(adapted, inputs)
    silent = [name for name, gradient in gradients.items() if gradient is None]
    again, checkpointed = gradients, "not supported"
    if model.supports_gradient_checkpointing:
        adapted.gradient_checkpointing_enable()
        try:
            again, checkpointed = trained(adapted, inputs), "yes"
        except RuntimeError as error:
            if (checkpointed := why_no_lora(type(model), folder / "source", inputs, kind)) != str(error):
                raise
            adapted.gradient_checkpointing_disable()
    worst = max(
        (
            relative(twice, once)
            for name, once in gradients.items()
            if once is not None and (twice := again[name]) is not None
        ),
        default=0.0,
    )
    if worst > 1e-4:
        raise AssertionError(f"with checkpointing gradients differ by {worst:.2g}")
    if kind == "causal":
        require_own_loss(model, inputs)
    report("train", silent=len(silent), vectors=len(gradients), checkpointed=checkpointed)
    perturb(adapted)
    adapted.save_pretrained(folder / "adapter")
    difference = relative(output(load_model(folder / "adapter"), inputs), output(adapted, inputs))
    if difference > 1e-5:
        raise AssertionError(f"loaded again, the adapter's outputs differ by {difference:.2g}")
    report("adapter")
    adapter, plain_class = folder / "adapter", type(model)
    export_merged(folder / "base", folder / "merged", adapter, dtype="float32")
    require_near(output(plain_class.from_pretrained(folder / "merged"), inputs), output(adapted, inputs))
    export_merged(folder / "base", folder / "onto", adapter, dtype="float32", onto="original")
    onto = output(plain_class.from_pretrained(folder / "onto"), inputs)
    report("export")
    export_lora(folder / "base", folder / "lora", adapter, dtype="float32")
    lora = PeftModel.from_pretrained(plain_class.from_pretrained(folder / "source"), folder / "lora")
    require_near(output(lora, inputs), onto)
    report("lora")


def require_own_loss(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Refuse a language model of whose logits the loss is not that `qosora train` computes."""
    labels = inputs["input_ids"]
    log_probs = output(model, inputs).log_softmax(-1)[:, :-1]
    expected = log_probs.gather(-1, labels[:, 1:, None])[..., 0]
    add_fused_lm_head(model, outputs=("log_probs",))
    keep_own_logits(model)
    with torch.no_grad():
        torch.manual_seed(0)
        found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    if (difference := relative(found, expected)) > 1e-3:
        raise AssertionError(f"log-probabilities that are trained differ by {difference:.2g} from the model's")


def require_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse outputs that differ by more than sums in another order."""
    if (difference := relative(got, expected)) > 1e-3:
        raise AssertionError(f"the export's outputs differ by {difference:.2g}")


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits, or whatever a model has first."""
    torch.manual_seed(0)  # as for the hashes of Reformer
    found = model.eval()(**inputs)
    chosen: torch.Tensor = found.logits if "logits" in found else found[0]
    return chosen.float()


def trained(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Return the gradients of the vectors for a loss of random directions."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    torch.manual_seed(0)
    found = model(**inputs)
    chosen = found.logits if "logits" in found else found[0]
    (chosen.float() * torch.randn(chosen.shape)).mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def why_no_lora(cls: Any, source: Path, inputs: dict[str, torch.Tensor], kind: str) -> str:
    """Return what training a LoRA with checkpointing ends with, in transformers and PEFT alone."""
    lora = LoraConfig(task_type=TASKS[kind], target_modules="all-linear")
    model = get_peft_model(cls.from_pretrained(source), lora)
    model.gradient_checkpointing_enable()
    try:
        trained(model, inputs)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Train vectors, as far as the outputs can tell."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "osora_" in name:
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))


def left(model: Any) -> dict[str, int]:
    """Return the entries of the matrices that are not decomposed, by name, but embeddings and output layer."""
    kinds = (nn.Embedding, QosoraLinear, OsoraLayer)
    known = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    head = model.get_output_embeddings()
    known |= {id(p) for p in head.parameters()} if head is not None else set()
    return {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in known}


def share(model: Any) -> float:
    """Return the part of the entries of matrices, but embeddings and output layer, that is decomposed."""
    decomposed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QosoraLinear))
    return round(decomposed / (decomposed + sum(left(model).values())), 4)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of a difference over that of what is expected."""
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def one(kind: str, model_type: str, class_name: str) -> dict[str, Any]:
    """Run a model's stages in a process of its own, and return how far it came."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        signal.alarm(LIMIT_SECONDS)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        found: dict[str, Any] = {"passed": []}

        def report(stage: str, **values: Any) -> None:
            found["passed"].append(stage)
            found.update(values)
            os.write(writer, (json.dumps(found) + "\n").encode())

        folder = ""
        try:
            with tempfile.TemporaryDirectory() as folder:
                stages(kind, model_type, class_name, Path(folder), report)
        except BaseException as error:
            end = "refused" if isinstance(error, QosoraError) else "failed"
            found[end] = f"{type(error).__name__}: {first_line(error).replace(folder + '/', '')}"[:300]
        os.write(writer, (json.dumps(found) + "\n").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        last = ([line for line in lines if line.endswith("\n")] or ["{}"])[-1]
    _, status = os.waitpid(child, 0)
    result: dict[str, Any] = json.loads(last)
    if os.WIFSIGNALED(status):
        result["failed"] = f"ended by signal {os.WTERMSIG(status)} after {result.get('passed', [])[-1:]}"
    return result


def main() -> None:
    """Run the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, with what has been run before")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--only", nargs="+", metavar="TYPE", help="these model types (or KIND/TYPE) alone, also if run before"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    models: dict[str, dict[str, Any]] = before.get("models", {})
    for kind in args.kinds:
        for model_type, class_name in architectures(kind):
            key = f"{kind}/{model_type}"
            if (key in models and not args.only) or (args.only and not {model_type, key} & set(args.only)):
                continue
            start = time.monotonic()
            models[key] = {"class": class_name, **one(kind, model_type, class_name)}
            models[key]["seconds"] = round(time.monotonic() - start, 1)
            print(key, models[key].get("refused") or models[key].get("failed") or "ok", flush=True)
            record = {"commit": commit(), "versions": versions(), "device": device(), "models": models}
            args.output.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
