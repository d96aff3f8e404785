"""Does reinforcement learning work with so few parameters? Reward by step of GRPO, qosora's vectors beside LoRA on NF4.

    python benchmarks/reward.py --output benchmarks/results/reward_cpu.json

The demo's task, filling in a delivery ticket from a letter, has a checkable answer. The demo's model is first trained
on a few examples, so that it finds the ticket now and then, and merged; then both methods go on from this model by
GRPO, with the same prompts, seeds and number of answers, each at its own best learning rate of four on the first seed.
An answer is worth 1 if it is the ticket, else 0. Greedy answers to the held-out letters are judged in the end. A
picture of the rewards goes beside the results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Record, arguments
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from qosora import QosoraConfig, TrainConfig, export_merged, generate, load_model, load_tokenizer, quantize, train
from qosora.demo import CONFIG, assets

QUESTION = "Does reinforcement learning work with qosora's vectors, and as well as with LoRA?"
RATES = {"qosora": (1e-3, 3e-3, 1e-2, 3e-2), "lora_r16": (1e-4, 3e-4, 1e-3, 3e-3)}
LABELS = {"qosora": ("qosora", "#1f6fa8"), "lora_r16": ("LoRA, r = 16, on NF4", "#d1495b")}
ANSWERS, LENGTH = 8, 14


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for each ticket that is right."""
    return [float(c.strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


def judged(model: Any, tokenizer: Any, test: list[dict[str, str]]) -> float:
    """Return the share of the held-out letters whose ticket is right by greedy generation."""
    prompts = [row["prompt"] for row in test]
    answers = generate(model, tokenizer, prompts, max_new_tokens=LENGTH)
    return sum(exact(answers, [row["completion"] for row in test])) / len(test)


def qosora(base: Path, demo: Path, folder: Path, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Go on with the vectors, by the command line's own function."""
    config = TrainConfig(
        model=str(base), data=str(demo / "train.jsonl"), output_dir=str(folder), method="grpo", reward=["exact"],
        num_generations=ANSWERS, max_completion_length=LENGTH, batch_size=args.batch, max_steps=args.steps,
        learning_rate=rate, schedule="constant_with_warmup", seed=seed, save_steps=0, progress=False, overwrite=True,
        precision="fp32", gradient_checkpointing=False,
    )  # fmt: skip
    result = train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [line["reward"] for line in lines if "reward" in line]
    return {"parameters": result.trained_parameters, "rewards": rewards}


def lora(model: Any, tokenizer: Any, demo: Path, folder: Path, rate: float, seed: int, args: argparse.Namespace) -> Any:
    """Go on with a LoRA of all linear layers, by TRL's trainer; return the model, and what it did."""
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": row["prompt"], "answer": row["completion"]} for row in rows])
    config = GRPOConfig(
        output_dir=str(folder), num_generations=ANSWERS, max_completion_length=LENGTH, max_steps=args.steps,
        per_device_train_batch_size=args.batch, learning_rate=rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.03, seed=seed, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trainer = GRPOTrainer(adapted, exact, args=config, train_dataset=data, processing_class=tokenizer)
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # TRL makes them bfloat16, which costs LoRA some of what it learns
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return adapted, {"parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad), "rewards": rewards}


def warm(demo: Path, folder: Path, args: argparse.Namespace) -> Path:
    """Return the demo's model, trained on some examples and merged."""
    quantize(demo / "model", folder / "demo", QosoraConfig(**CONFIG))
    train(TrainConfig(
        model=str(folder / "demo"), data=str(demo / "train.jsonl"), output_dir=str(folder / "sft"), batch_size=16,
        max_steps=args.warm_steps, learning_rate=1e-2, save_steps=0, progress=False,
    ))  # fmt: skip
    export_merged(folder / "demo", folder / "model", folder / "sft", dtype=torch.float32)
    return folder / "model"


def picture(found: dict[str, Any]) -> Figure:
    """Return rewards by step, smoothed over 5 steps, with a line for each seed."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (label, color) in LABELS.items():
        for key, run in found["results"].items():
            if key.startswith(f"{name}_seed"):
                rewards = torch.tensor([run["rewards"]])
                width = min(5, rewards.shape[-1])
                smooth = torch.nn.functional.avg_pool1d(rewards, width, stride=1)[0].tolist()
                text = f"{label}, {run['parameters']:,} parameters" if key.endswith("seed0") else None
                axes.plot(range(width, width + len(smooth)), smooth, color=color, label=text, alpha=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("share of right answers (mean of 5 steps)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Measure both methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm-steps", type=int, default=48, help="of training on examples, before")
    parser.add_argument("--steps", type=int, default=80, help="of GRPO")
    parser.add_argument("--batch", type=int, default=64, help="answers in a step")
    parser.add_argument("--seeds", type=int, default=3, help="at the best learning rate")
    args = arguments(parser, warm_steps=2, steps=2, batch=8, seeds=1)
    config = {name: getattr(args, name) for name in ("warm_steps", "steps", "batch", "seeds")}
    record = Record(args.output, "reward", QUESTION, config | {"rates": RATES}, args.resume)
    with tempfile.TemporaryDirectory() as temporary, assets() as demo:
        folder = Path(temporary)
        model, test = warm(demo, folder, args), [json.loads(line) for line in (demo / "test.jsonl").open()]
        quantize(model, folder / "base", QosoraConfig(**CONFIG))
        tokenizer = load_tokenizer(folder / "base")

        def run(name: str, rate: float, seed: int) -> dict[str, Any]:
            if name == "qosora":
                made = qosora(folder / "base", demo, folder / "run", rate, seed, args)
                return {**made, "rate": rate, "right": judged(load_model(folder / "run"), tokenizer, test)}
            nf4 = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
            loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4, dtype=torch.float32)
            adapted, made = lora(
                loaded, AutoTokenizer.from_pretrained(folder / "base"), demo, folder / "lora", rate, seed, args
            )
            return {**made, "rate": rate, "right": judged(adapted, tokenizer, test)}

        record.stage("before", lambda: {"right": judged(load_model(folder / "base"), tokenizer, test)})
        for name, rates in RATES.items():
            found = [record.stage(f"{name}_lr{rate:g}", partial(run, name, rate, 0)) for rate in rates]
            best = max(found, key=lambda made: sum(made["rewards"][-10:]))
            first = {key: value for key, value in best.items() if key != "wall_seconds"}
            record.stage(f"{name}_seed0", partial(dict, first))
            for seed in range(1, args.seeds):
                record.stage(f"{name}_seed{seed}", partial(run, name, best["rate"], seed))
    picture({"results": record.results()}).savefig(Path(args.output).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
