"""Does reinforcement learning work with so few parameters? Reward by step of GRPO, qosora's vectors beside LoRA on NF4.

    python benchmarks/reward.py --output benchmarks/results/reward_cpu.json
    python benchmarks/reward.py --output benchmarks/results/reward_gsm8k_cpu.json --task gsm8k \
        --model gemma-3-270m.Q4_K_M.gguf --data-dir data --work-dir work

The task's model is first trained on a few examples, so that it finds a good answer now and then, and merged; then both
methods go on from this model by GRPO, with the same prompts, seeds and number of answers. Greedy answers to held-out
prompts are judged in the end. A picture of the rewards goes beside the results.

    demo         filling in a delivery ticket from a letter: 1 for the ticket, else 0. Each method at its own best
                 learning rate of four on the first seed
    gsm8k        Gemma 3 270M, short questions: 1 for the right number, and the share of sums in the answer that are
                 right (examples/gsm8k_reward.py). LoRA at the better of two learning rates

Both compute in float32 from the values as they are stored.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Record, arguments
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from qosora import QosoraConfig, TrainConfig, export_merged, generate, load_model, load_tokenizer, quantize, train
from qosora.demo import CONFIG
from qosora.training import MetricsLog
from qosora.training.rewards import load_rewards

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "quality"))

from tasks import Row, prepare  # noqa: E402
from trained import BASES  # noqa: E402

QUESTION = "Does reinforcement learning work with qosora's vectors, and as well as with LoRA?"
LABELS = {"qosora": ("qosora", "#1f6fa8"), "lora_r16": ("LoRA, r = 16, on NF4", "#d1495b")}
ANSWERS = 8  # to each prompt


@dataclass(frozen=True)
class Task:
    """What is rewarded.

    Args:
        name: Of the task.
        model: Folder of the 16-bit model.
        config: Of qosora's base.
        splits: Rows with prompt and completion: "train" and "test".
        rewards: As `--reward` has them.
        length: Tokens of an answer at most.
        rates: Learning rates to choose from.
        warm_rate: Learning rate of the training on examples.
        warm_batch: Examples in a step of it.
    """

    name: str
    model: Path
    config: QosoraConfig
    splits: dict[str, list[Row]]
    rewards: list[str]
    length: int
    rates: dict[str, list[float]]
    warm_rate: float
    warm_batch: int

    def asked(self, split: str) -> list[dict[str, str]]:
        """Rows of prompts and what is right."""
        return [{"prompt": row["prompt"], "answer": row["completion"]} for row in self.splits[split]]

    def judged(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return the mean of each reward over greedy answers to the held-out prompts."""
        rows = self.asked("test")
        prompts, right = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        completions = generate(model, tokenizer, prompts, max_new_tokens=self.length, batch_size=32)
        rewards = load_rewards(self.rewards, ["prompt", "answer"])
        scores = [reward(prompts=prompts, completions=completions, answer=right) for reward in rewards]
        return {reward.__name__: sum(s) / len(s) for reward, s in zip(rewards, scores, strict=True)}


def task_of(args: argparse.Namespace, work: Path) -> Task:
    """Return the task that is asked for."""
    made = prepare([args.task], args.model, args.data_dir, work)[args.task]
    if args.task == "demo":
        rates = {"qosora": [1e-3, 3e-3, 1e-2, 3e-2], "lora_r16": [1e-4, 3e-4, 1e-3, 3e-3]}
        splits = {"train": made.splits["train"] + made.splits["validation"], "test": made.splits["test"]}
        return Task("demo", made.model, QosoraConfig(**CONFIG), splits, ["exact"], 14, rates, 1e-2, 16)

    def short(rows: Sequence[Row]) -> list[Row]:
        lengths = [[len(made.tokenizer(row[part])["input_ids"]) for part in ("prompt", "completion")] for row in rows]
        return [row for row, length in zip(rows, lengths, strict=True) if max(length) <= 64]

    splits = {split: short(made.splits[split]) for split in ("train", "test")}
    rewards = ["number", f"{HERE.parent / 'examples' / 'gsm8k_reward.py'}:sums"]
    rates = {"qosora": [3e-3], "lora_r16": [3e-5, 1e-4]}
    return Task("gsm8k", made.model, QosoraConfig(), splits, rewards, 64, rates, 1e-2, 4)


def qosora(task: Task, base: Path, folder: Path, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Go on with the vectors, by the command line's own function."""
    data = folder.parent / "asked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in task.asked("train")), encoding="utf-8")
    result = train(TrainConfig(
        model=str(base), data=str(data), output_dir=str(folder), method="grpo", reward=task.rewards,
        num_generations=ANSWERS, max_completion_length=task.length, batch_size=args.batch, max_steps=args.steps,
        learning_rate=rate, schedule="constant_with_warmup", seed=seed, save_steps=0, progress=False, overwrite=True,
        precision="fp32", gradient_checkpointing=False,
    ))  # fmt: skip
    rewards = [line["reward"] for line in MetricsLog(folder / "metrics.jsonl").read() if "reward" in line]
    adapted = load_model(folder, dtype=torch.float32)
    judged = task.judged(adapted, load_tokenizer(base))
    return {"parameters": result.trained_parameters, "rewards": rewards, "right": judged}


def lora(task: Task, base: Path, folder: Path, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Go on with a LoRA of all linear layers over NF4 values, by TRL's trainer."""
    config = GRPOConfig(
        output_dir=str(folder), num_generations=ANSWERS, max_completion_length=task.length, max_steps=args.steps,
        per_device_train_batch_size=args.batch, learning_rate=rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.03, seed=seed, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model, _ = BASES["nf4"](task, folder)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = GRPOTrainer(
        adapted, load_rewards(task.rewards, ["prompt", "answer"]), args=config,
        train_dataset=Dataset.from_list(task.asked("train")), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {"parameters": count, "rewards": rewards, "right": task.judged(adapted, tokenizer)}


def warm(task: Task, folder: Path, args: argparse.Namespace) -> Path:
    """Return the task's model, trained on some examples and merged."""
    data = folder / "examples.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in task.splits["train"]), encoding="utf-8")
    quantize(task.model, folder / "first", task.config)
    train(TrainConfig(
        model=str(folder / "first"), data=str(data), output_dir=str(folder / "sft"), batch_size=task.warm_batch,
        max_steps=args.warm_steps, learning_rate=task.warm_rate, save_steps=0, progress=False, precision="fp32",
    ))  # fmt: skip
    export_merged(folder / "first", folder / "model", folder / "sft", dtype=torch.float32)
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
    axes.set_ylabel("reward (mean of 5 steps)")
    axes.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Measure both methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("demo", "gsm8k"), default="demo")
    parser.add_argument("--model", type=Path, help="gsm8k: Gemma 3 270M, a GGUF file or a folder")
    parser.add_argument("--data-dir", type=Path, help="gsm8k: folder with gsm8k/ and openbookqa/")
    parser.add_argument("--work-dir", type=Path, help="folder for models, to be kept (default: one that is not)")
    parser.add_argument("--warm-steps", type=int, default=48, help="of training on examples, before")
    parser.add_argument("--steps", type=int, default=80, help="of GRPO")
    parser.add_argument("--batch", type=int, default=64, help="answers in a step")
    parser.add_argument("--seeds", type=int, default=3, help="at the best learning rate")
    parser.add_argument("--methods", nargs="+", choices=sorted(LABELS), default=list(LABELS))
    args = arguments(parser, warm_steps=2, steps=2, batch=8, seeds=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first = task_of(args, args.work_dir or folder)
        config = {name: getattr(args, name) for name in ("task", "warm_steps", "steps", "batch", "seeds")}
        config |= {"rates": first.rates, "asked": len(first.splits["test"])}
        record = Record(args.output, "reward", QUESTION, config, args.resume)
        task = replace(first, model=warm(first, folder, args))
        quantize(task.model, folder / "base", task.config)
        before = load_model(folder / "base", dtype=torch.float32)
        record.stage("before", lambda: {"right": task.judged(before, load_tokenizer(folder / "base"))})
        ways = {"qosora": qosora, "lora_r16": lora}

        def run(name: str, rate: float, seed: int) -> dict[str, Any]:
            return {**ways[name](task, folder / "base", folder / "run", rate, seed, args), "rate": rate}

        for name in args.methods:
            rates = task.rates[name]
            found = [record.stage(f"{name}_lr{rate:g}", partial(run, name, rate, 0)) for rate in rates]
            best = max(found, key=lambda made: sum(made["rewards"][-10:]))
            chosen = {key: value for key, value in best.items() if key != "wall_seconds"}
            record.stage(f"{name}_seed0", partial(dict, chosen))
            for seed in range(1, args.seeds):
                record.stage(f"{name}_seed{seed}", partial(run, name, best["rate"], seed))
    picture({"results": record.results()}).savefig(Path(args.output).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
