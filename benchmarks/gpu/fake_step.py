"""Whole training steps on CUDA tensors without a card: a tensor on the wrong device, or no kernel for it, shows here.

The tensors are torch's fake ones: they have a device and no memory, and each operation checks that its operands are on
one device. It wants a CUDA build of torch, which needs not be that of the tests, and a C compiler; a stand-in for the
driver tells torch that there is a card (cuda_stand_in.c).

    python -m venv cuda && cuda/bin/pip install torch bitsandbytes 'nvidia-cuda-crt==13.0.*'   # on Linux CUDA's
    cuda/bin/python benchmarks/gpu/fake_step.py --site .venv/lib/python3.11/site-packages \
        --output benchmarks/results/fake_cuda.json

What is stood in for besides the driver: streams, random states, sums over the data (experts are given tokens as for a
plan), paging. TRL's chunked loss looks at the data, so here the loss is the model's own. Also looked up: whether
bitsandbytes' CUDA libraries have all functions that its Python code calls.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
READY = "QOSORA_CUDA_STAND_IN"
QUESTION = "Does a training step's every operation find its tensors on one CUDA device, and a kernel there?"
TOKENS, RANK = (2, 64), 16
#: Capabilities of cards that take different ways: without torch's grouped product, and with.
CAPABILITIES = ((8, 9), (9, 0))
#: Names that bitsandbytes looks up in the libraries of other devices.
OF_OTHERS = {"has_avx512bf16_cpu", "name"}


def start_again(site: str) -> None:
    """Compile the stand-ins, and run this with them."""
    packages = Path(sysconfig.get_paths()["purelib"])
    (include,) = {file.parent for file in packages.glob("nvidia/*/include/cuda_runtime_api.h")}
    with tempfile.TemporaryDirectory() as folder:
        compile_ = ["gcc", "-shared", "-fPIC", str(HERE / "cuda_stand_in.c")]
        subprocess.run([*compile_, f"-I{include}", "-o", f"{folder}/runtime.so"], check=True)
        driver = f"{folder}/libcuda.so.1"
        subprocess.run([*compile_, "-DDRIVER", f"-Wl,-soname,{Path(driver).name}", "-o", driver], check=True)
        env = {**os.environ, READY: "1", "LD_LIBRARY_PATH": folder, "LD_PRELOAD": f"{folder}/runtime.so"}
        run = subprocess.run([sys.executable, *sys.argv], env=env)
    raise SystemExit(run.returncode)


def missing_symbols() -> dict[str, list[str]]:
    """Return the functions that bitsandbytes calls and one of its CUDA libraries has not, by library."""
    import bitsandbytes

    folder = Path(bitsandbytes.__file__).parent
    code = [file for file in folder.rglob("*.py") if not {"cpu", "xpu", "hpu", "mps"} & set(file.parts)]
    called = {name for file in code for name in re.findall(r"\blib\.([a-z]\w+)", file.read_text(encoding="utf-8"))}
    found = {}
    for library in sorted(folder.glob("libbitsandbytes_cuda*.so")):
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
        )
        found[library.name] = sorted(called - OF_OTHERS - {line.split()[-1] for line in listed.stdout.splitlines()})
    return found


def configs() -> dict[str, Any]:
    """Return the models: dense, a mixture, tied embeddings."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512,
    }  # fmt: skip
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return {
        "llama": LlamaConfig(**sizes),
        "qwen3_moe": Qwen3MoeConfig(**sizes, **mixture),
        "gemma3_text": Gemma3TextConfig(**sizes),
    }


def without_a_card(stack: ExitStack, capability: tuple[int, int]) -> None:
    """Replace what would ask a card, or the data."""
    import torch

    from qosora.decompose import nf4
    from qosora.layers import experts, fused
    from qosora.layers.stacks import hardest
    from qosora.training import flat_buffers

    cuda: Any = torch.cuda
    cuda._lazy_init, cuda._initialized = (lambda: None), True
    for owner, name, stand_in in (
        (cuda, "is_available", lambda: False),  # what torch's fake tensors would try a real one for
        (cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8)),
        (cuda, "set_rng_state", lambda *args, **options: None),
        (cuda, "_exchange_device", lambda index: 0),
        (cuda, "_maybe_exchange_device", lambda index: 0),
        (cuda, "get_device_capability", lambda device=None: capability),
        (experts, "_tokens_of_each", lambda chosen, count: hardest(len(chosen), chosen.shape[1], count)),
        (nf4, "_made_absmax_code", lambda device: torch.empty(256, device=device)),
        (flat_buffers, "launching", lambda tensor: nullcontext()),
        (flat_buffers, "from_dlpack", lambda tensor: tensor.detach()),
    ):
        stack.enter_context(patch.object(owner, name, stand_in))
    stack.enter_context(fused(False))


def step(name: str, precision: str, *, checkpointing: bool, capability: tuple[int, int], astray: bool = False) -> int:
    """Run a step of a model; return how many parameters it trained.

    Args:
        name: Of `configs`.
        precision: "bf16" or "fp32".
        checkpointing: Whether layers are.
        capability: Of the card.
        astray: Whether a vector is on the CPU, which has to fail.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qosora.config import QosoraConfig
    from qosora.memory import Batch, StepOptions, TracedModel, fill_at_random, training_step
    from qosora.training import create_optimizer

    options = StepOptions(precision=precision, gradient_checkpointing=checkpointing, chunked_loss=False)
    model = TracedModel(configs()[name], QosoraConfig(rank=RANK), options, full_depth=True).model
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        without_a_card(stack, capability)
        fill_at_random(model, "cuda")
        for key, p in model.named_parameters():
            p.requires_grad_(key in trained)
        optimizer = create_optimizer(model, lr=1e-3)
        if astray:
            layer = next(m for m in model.modules() if hasattr(m, "osora_o"))
            layer.base_layer.c = torch.nn.Parameter(torch.empty_like(layer.base_layer.c, device="cpu"), False)
        inputs = {key: t.to("cuda") for key, t in Batch(*TOKENS, padding=True).tensors(512, "cpu").items()}
        loss = training_step(model, inputs, optimizer, loss="whole")
        devices = {str(t.device) for t in (loss, *model.parameters(), *model.buffers())}
    if devices != {"cuda:0"}:
        raise RuntimeError(f"after the step there are tensors on {sorted(devices)}")
    return len(trained)


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--site", required=True, help="folder of packages that has all but torch and bitsandbytes")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    if READY not in os.environ:
        start_again(args.site)
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
    sys.path.append(args.site)
    import torch
    from common import Record

    config = {"tokens": TOKENS, "rank": RANK, "cuda": torch.version.cuda}
    with patch.object(torch.cuda, "is_available", lambda: False):  # which would be asked for its name
        record = Record(args.output, "fake_step", QUESTION, config, resume=False)
    record.stage("symbols", lambda: {"missing": missing_symbols()})
    for name, capability, precision, checkpointing in product(configs(), CAPABILITIES, ("bf16", "fp32"), (True, False)):
        run = partial(step, name, precision, checkpointing=checkpointing, capability=capability)
        how = f"{precision}_{'checkpointed' if checkpointing else 'kept'}_{capability[0]}.{capability[1]}"
        record.stage(f"{name}_{how}", partial(_trained, run))
    try:
        step("llama", "bf16", checkpointing=True, capability=CAPABILITIES[0], astray=True)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        record.stage("a vector on the CPU", lambda: {"refused": message})
    else:
        raise SystemExit("a vector on the CPU went unseen, so the others prove nothing")


def _trained(run: Callable[[], int]) -> dict[str, Any]:
    return {"trained": run()}


if __name__ == "__main__":
    main()
