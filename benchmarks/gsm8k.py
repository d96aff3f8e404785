"""Does it train on a real model and real data? Quantize, fine-tune on GSM8K, evaluate, export, generate; QLoRA beside.

    python benchmarks/gsm8k.py --model gemma-3-270m.Q4_K_M.gguf --data-dir gsm8k --output results.json

Losses are cross-entropies of the answers' tokens, end-of-sequence token included, in nats per token, computed in
--precision, as in training. The rival, PEFT's LoRA on NF4 values, gets the same examples in the same order from the
same trainer. The vocabulary is cut to what GSM8K needs (see vocabulary.py), for a CPU's sake; --keep-vocabulary leaves
it whole. `--resume` goes on from the stages that the output holds, with the same --work-dir.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Record, quantiles
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from vocabulary import cut_model, cut_tokenizer

from qosora.base import load_base, load_model, load_tokenizer, quantize
from qosora.base.describe import describe
from qosora.config import QosoraConfig
from qosora.data import load_records, tokenize
from qosora.decompose import measure_error, nf4
from qosora.decompose.factorize import factorize
from qosora.export import export_merged
from qosora.inference import EvalResult, evaluate, generate
from qosora.layers import fast_dtype
from qosora.training import MetricsLog, QosoraTrainer, Recorder, TrainConfig, train, trl_config

QUESTION = "Does it train on a real LLM and real data, and how does it compare with QLoRA on the same steps?"
#: How a question and its answer become a prompt; the loss of the untrained model is measured for each.
TEMPLATES = (
    "{question}\n",
    "{question}\n\n",
    "Question: {question}\nAnswer: ",
    "Q: {question}\nA: ",
)
LORA_RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Run:
    """The options, and where things are.

    Args:
        args: As given.
        work: Folder for models, data and adapters.
    """

    args: argparse.Namespace
    work: Path

    @property
    def model(self) -> Path:
        """The 16-bit model with its cut vocabulary."""
        return self.work / "model"

    @property
    def dtype(self) -> torch.dtype:
        """What all methods compute in."""
        return torch.bfloat16 if self.args.precision == "bf16" else torch.float32

    def base(self, rank: int) -> Path:
        """The qosora base of a rank."""
        return self.work / f"base-r{rank}"

    def data(self, split: str) -> Path:
        """GSM8K as prompts and completions."""
        return self.work / f"{split}.jsonl"

    def rows(self, split: str) -> list[dict[str, str]]:
        """GSM8K as it came."""
        text = (Path(self.args.data_dir) / f"{split}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def test(self, template: str, limit: int | None) -> list[dict[str, str]]:
        """The first test questions as prompts and completions."""
        return prompts(self.rows("test")[:limit], template)

    def train_config(self, model: Path, name: str, learning_rate: float, **options: Any) -> TrainConfig:
        """The configuration that all trainings share."""
        args = self.args
        return TrainConfig(
            model=str(model),
            data=str(self.data("train")),
            eval_data=str(self.data("test")),
            eval_limit=args.limit_test,
            eval_batch_size=8,
            output_dir=str(self.work / name),
            precision=args.precision,
            gradient_checkpointing=False,
            learning_rate=learning_rate,
            warmup_ratio=args.warmup_ratio,
            batch_size=args.batch_size,
            save_steps=0,
            overwrite=True,
            **{"max_steps": args.steps, "eval_steps": max(1, args.steps // 2), "seed": args.seed, **options},
        )


def prompts(rows: list[dict[str, str]], template: str) -> list[dict[str, str]]:
    """Return rows of GSM8K as prompts and completions."""
    return [{"prompt": template.format(question=r["question"]), "completion": r["answer"]} for r in rows]


# The model and the data


def prepare_model(run: Run) -> dict[str, Any]:
    """Write the model in bfloat16, with the vocabulary cut; check its logits against the whole model's."""
    tokenizer, model = load_source(Path(run.args.model))
    rows = run.rows("train") + run.rows("test")
    found: dict[str, Any] = {"source": Path(run.args.model).name, "vocabulary_before": model.config.vocab_size}
    if not run.args.keep_vocabulary:
        texts = [p["prompt"] + p["completion"] for p in prompts(rows, run.args.template)]
        for template in TEMPLATES:
            texts += [p["prompt"] + p["completion"] for p in run.test(template, run.args.limit_test)]
        small, kept = cut_tokenizer(tokenizer, texts)
        sample = [texts[0], texts[len(rows) // 2]]
        whole = [logits(model, tokenizer(text)["input_ids"])[:, kept] for text in sample]
        cut_model(model, kept)
        cut = [logits(model, small(text)["input_ids"]) for text in sample]
        found["texts_with_equal_tokens"] = len(texts)
        found["largest_logit_difference_float32"] = max(
            float((a - b).abs().max()) for a, b in zip(whole, cut, strict=True)
        )
        tokenizer = small
    model.to(torch.bfloat16).save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    for split in ("train", "test"):
        lines = (json.dumps(row) + "\n" for row in prompts(run.rows(split), run.args.template))
        run.data(split).write_text("".join(lines), encoding="utf-8")
    found["vocabulary"] = len(tokenizer)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def load_source(source: Path) -> tuple[Any, PreTrainedModel]:
    """Return tokenizer and float32 model of a GGUF file or a model folder."""
    options = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    folder = source.parent if options else source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if hasattr(model, "hf_quantizer"):  # the weights are dequantized, and to be saved so
        model.hf_quantizer.remove_quantization_config(model)
    return AutoTokenizer.from_pretrained(folder, **options), model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Return a text's logits, (length, vocabulary)."""
    return model(input_ids=torch.tensor([ids])).logits[0]


# Losses


def plain_model(run: Run, dtype: torch.dtype, four_bit: bool = False) -> PreTrainedModel:
    """Load the 16-bit model, or the same with the values that QLoRA stores in its linear layers.

    NF4 with double quantization, made by bitsandbytes and dequantized once: bitsandbytes' own 4-bit layer gives the
    same values, but takes half a minute a step on a CPU.
    """
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype).eval()
    for name, module in model.named_modules() if four_bit else ():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.weight.data = nf4.dequantize(nf4.quantize(module.weight.data), dtype)
    return model


def loss_of(run: Run, model: Any, template: str | None = None, limit: int | None = None) -> EvalResult:
    """Evaluate a model on the first test questions."""
    rows = run.test(template or run.args.template, limit or run.args.limit_test)
    return evaluate(model, load_tokenizer(run.model), load_records(rows))


def untrained_losses(run: Run) -> dict[str, Any]:
    """Return the losses of the model as it is, in NF4, and as qosora bases."""
    models: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: plain_model(run, run.dtype),
        "nf4": lambda: plain_model(run, run.dtype, four_bit=True),
        **{f"qosora_r{rank}": partial(load_base, run.base(rank), dtype=run.dtype) for rank in ranks(run)},
    }
    found: dict[str, Any] = {}
    for name, load in models.items():
        result = loss_of(run, load())
        found[name] = round(result.loss, 4)
        found["answer_tokens"] = result.tokens
        gc.collect()
    return found


def float32_loss(run: Run) -> dict[str, Any]:
    """Return the loss of the model as it is, computed in float32."""
    return {"float32": round(loss_of(run, plain_model(run, torch.float32)).loss, 4)}


def template_losses(run: Run) -> dict[str, Any]:
    """Return the untrained 16-bit model's loss for each way to write a prompt."""
    model = plain_model(run, run.dtype)
    return {repr(template): round(loss_of(run, model, template).loss, 4) for template in TEMPLATES}


def ranks(run: Run) -> list[int]:
    """Return the ranks of the bases: half the rank that is trained, and it."""
    return [run.args.rank // 2, run.args.rank]


def factorization(run: Run) -> dict[str, Any]:
    """Make the bases; return their errors beside NF4's."""
    found = {}
    for rank in ranks(run):
        config = QosoraConfig(rank=rank)
        report = quantize(run.model, run.base(rank), config, overwrite=True)
        found[f"r{rank}"] = {
            "svd_iterations": config.svd_iterations,
            "error": mean([layer.error for layer in report.layers]),
            "nf4_error": mean([layer.nf4_error for layer in report.layers]),
            "bits_per_parameter": mean([layer.bits_per_parameter for layer in report.layers]),
            "base_bytes": report.base_bytes,
            "seconds": round(report.seconds, 1),
            "by_kind": {k: {n: round(x, 4) for n, x in v.items()} for k, v in report.by_kind().items()},
        }
    return found


def mean(values: list[float]) -> float:
    """Return the mean, rounded."""
    return round(sum(values) / len(values), 4)


# Training


def train_qosora(run: Run, name: str = "qosora", **options: Any) -> dict[str, Any]:
    """Train the vectors; return the course of the loss, sizes and times."""
    learning_rate = options.pop("learning_rate", run.args.lr)
    result = train(run.train_config(run.base(run.args.rank), name, learning_rate, **options))
    return {
        "learning_rate": learning_rate,
        "rank": run.args.rank,
        **options,
        "trained_parameters": result.trained_parameters,
        "adapter_bytes": describe(run.work / name)["file_bytes"],
        **course(run.work / name / "metrics.jsonl"),
    }


def train_qlora(run: Run, learning_rate: float, name: str) -> dict[str, Any]:
    """Train LoRA on NF4 values with the trainer, data and order that qosora gets; no time is spent on 4-bit storage."""
    config = run.train_config(run.model, name, learning_rate)
    folder = run.work / name
    folder.mkdir(exist_ok=True)
    metrics = MetricsLog(folder / "metrics.jsonl")
    metrics.path.unlink(missing_ok=True)
    tokenizer = load_tokenizer(run.model)
    examples = tokenize(load_records(config.data), tokenizer, max_length=config.max_length)
    held_out = tokenize(load_records(str(run.data("test")), limit=config.eval_limit), tokenizer)
    adapter = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    trainer = QosoraTrainer(
        model=get_peft_model(plain_model(run, run.dtype, four_bit=True), adapter),
        args=trl_config(config, "bf16", folder),
        train_dataset=Dataset.from_dict(examples.columns()),
        eval_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),  # it evaluates the examples below
        eval_examples=held_out.examples,
        processing_class=tokenizer,
        callbacks=[Recorder(metrics, progress=True)],
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.evaluate()
    trainer.train()
    trainer.save_model(str(folder))
    return {
        "learning_rate": learning_rate,
        "rank": LORA_RANK,
        "trained_parameters": sum(p.numel() for p in trained),
        "adapter_bytes": sum(f.stat().st_size for f in folder.glob("adapter_model*.safetensors")),
        **course(metrics.path),
    }


def course(metrics: Path) -> dict[str, Any]:
    """Return evaluation losses by step, training losses at the ends, and seconds per step."""
    lines = MetricsLog(metrics).read()
    steps = [line for line in lines if "loss" in line]
    seconds = [b["wall_seconds"] - a["wall_seconds"] for a, b in pairwise(steps)]
    tenth = max(1, len(steps) // 10)
    return {
        "test_loss": {str(line["step"]): round(line["eval_loss"], 4) for line in lines if "eval_loss" in line},
        "train_loss_first_tenth": mean([line["loss"] for line in steps[:tenth]]),
        "train_loss_last_tenth": mean([line["loss"] for line in steps[-tenth:]]),
        "seconds_per_step": quantiles(seconds),
        "tokens_per_second": quantiles([line["tokens_per_second"] for line in steps]),
    }


def sweep(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the further trainings that were asked for: name, and options that differ."""
    for rate in run.args.more_learning_rates:
        yield f"qosora_lr{rate:g}", {"learning_rate": rate}
    for vectors in run.args.vectors:
        yield f"qosora_{vectors}_only", {"vectors": vectors}
    for seed in run.args.more_seeds:
        yield f"qosora_seed{seed}", {"seed": seed}
    if run.args.more_steps:
        yield f"qosora_{run.args.more_steps}_steps", {"max_steps": run.args.more_steps}


# After training


def export(run: Run) -> dict[str, Any]:
    """Export the trained model; compare it, loaded by transformers, with base and adapter; show answers."""
    report = export_merged(run.base(run.args.rank), run.work / "merged", run.work / "qosora", overwrite=True)
    adapted = load_model(run.work / "qosora", dtype=run.dtype)
    merged = AutoModelForCausalLM.from_pretrained(run.work / "merged", dtype=run.dtype).eval()
    tokenizer = load_tokenizer(run.work / "merged")
    rows = run.test(run.args.template, 3)
    start = time.perf_counter()
    answers = generate(merged, tokenizer, [r["prompt"] for r in rows], max_new_tokens=128)
    return {
        "export_bytes": report.total_bytes,
        "test_loss_adapter": round(loss_of(run, adapted).loss, 4),
        "test_loss_merged_bfloat16": round(loss_of(run, merged).loss, 4),
        "generate_seconds": round(time.perf_counter() - start, 1),
        "answers": [{**row, "generated": text} for row, text in zip(rows, answers, strict=True)],
    }


def whole_test_set(run: Run) -> dict[str, Any]:
    """Return losses on all test questions, before and after."""
    limit = len(run.rows("test"))
    models: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: plain_model(run, run.dtype),
        "nf4": lambda: plain_model(run, run.dtype, four_bit=True),
        f"qosora_r{run.args.rank}": lambda: load_base(run.base(run.args.rank), dtype=run.dtype),
        "qosora_trained": lambda: load_model(run.work / "qosora", dtype=run.dtype),
    }
    return {"questions": limit} | {n: round(loss_of(run, load(), limit=limit).loss, 4) for n, load in models.items()}


def svd_iterations(run: Run) -> dict[str, Any]:
    """Return error and time of a few factorizations by power iterations of the SVD."""
    file = next(run.model.glob("*.safetensors"))
    settings = [{"svd_iterations": i} for i in (0, 1, 2, 4)] + [{"svd": "exact"}]
    found: dict[str, Any] = {}
    with safe_open(file, "pt") as tensors:
        names = [n for n in tensors.keys() if n.endswith(("q_proj.weight", "down_proj.weight"))]  # noqa: SIM118
        names = [n for n in names if any(f"layers.{i}." in n for i in (0, 8, 17))]
        for name in sorted(names):
            weight, rows = tensors.get_tensor(name), {}
            for setting in settings:
                start = time.perf_counter()
                factors = factorize(weight, run.args.rank, **setting)
                seconds = time.perf_counter() - start
                errors = measure_error(weight, factors)
                rows[str(*setting.values())] = {"error": round(errors.error, 5), "seconds": round(seconds, 3)}
            found[name] = {"shape": list(weight.shape), "nf4_error": round(errors.nf4_error, 5), "by_iterations": rows}
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", required=True, help="GGUF file or model folder")
    parser.add_argument("--model-name", help="what the results call it (default: its file name)")
    parser.add_argument("--data-dir", required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--work-dir", help="folder for models and adapters (default: a temporary one)")
    parser.add_argument("--resume", action="store_true", help="keep the stages that the output holds")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    parser.add_argument("--template", default=TEMPLATES[0], help="prompt; {question} stands for the question")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--warmup-ratio", type=float, default=0.03, help="part of the steps; of both methods")
    parser.add_argument("--lora-lr", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit-test", type=int, default=128, help="test questions for all but the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="bf16",
        help='of the computation; "auto" takes fp32 where the CPU is slow in bfloat16 (default: bf16)',
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--keep-vocabulary", action="store_true", help="do not cut the vocabulary")
    parser.add_argument("--more-learning-rates", type=float, nargs="*", default=[], help="further trainings")
    parser.add_argument("--vectors", nargs="*", default=[], choices=("s", "o"), help="further trainings of one vector")
    parser.add_argument("--more-seeds", type=int, nargs="*", default=[], help="further trainings, data reordered")
    parser.add_argument("--more-steps", type=int, help="a further, longer training")
    parser.add_argument("--whole-test-set", action="store_true", help="also measure losses on all test questions")
    args = parser.parse_args()
    if args.precision == "auto":
        args.precision = "bf16" if fast_dtype(torch.bfloat16) == torch.bfloat16 else "fp32"
    return args


def stages(run: Run) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return every stage by name, in order."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "model": partial(prepare_model, run),
        "factorization": partial(factorization, run),
        "untrained_test_loss": partial(untrained_losses, run),
        "qosora": partial(train_qosora, run),
        "export": partial(export, run),
        **{f"qlora_lr{rate:g}": partial(train_qlora, run, rate, f"qlora_lr{rate:g}") for rate in run.args.lora_lr},
        "svd_iterations": partial(svd_iterations, run),
        **{name: partial(train_qosora, run, name, **options) for name, options in sweep(run)},
        "templates": partial(template_losses, run),
        "untrained_test_loss_float32": partial(float32_loss, run),
    }
    if run.args.whole_test_set:
        found["whole_test_set"] = partial(whole_test_set, run)
    return found


def main() -> None:
    """Run the benchmark."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    hidden = {"model", "model_name", "data_dir", "output", "work_dir", "resume", "only", "threads"}
    hidden |= {
        "more_learning_rates",
        "more_seeds",
        "vectors",
        "more_steps",
        "whole_test_set",
        "lora_lr",
    }  # stages tell these
    config = {"model": args.model_name or Path(args.model).name, "model_file": Path(args.model).name}
    config |= {"data": "GSM8K"} | {k: v for k, v in vars(args).items() if k not in hidden}
    record = Record(args.output, "gsm8k", QUESTION, config, args.resume)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work_dir or temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name, action in stages(Run(args, work)).items():
            if not args.only or name in args.only:
                record.stage(name, action)


if __name__ == "__main__":
    main()
