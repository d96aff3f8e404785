"""Fine-tune an encoder-decoder (T5, BART, mBART, NLLB) from pairs of texts, with transformers' own trainer.

    python examples/translate.py --model google/flan-t5-base --data pairs.jsonl --output-dir my-adapter

The data are JSON lines with `source` and `target`. `qosora train` takes models that write on from a text; everything
else is an ordinary base and an ordinary PEFT adapter, which any trainer takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from qosora import OsoraConfig, QosoraConfig, create_optimizer, export_merged, quantize


def main() -> None:
    """Parse the arguments, decompose the model if that was not done before, train, save, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/flan-t5-base", help="folder or hub id of the original model")
    parser.add_argument("--data", required=True, help="JSON lines with source and target")
    parser.add_argument("--output-dir", required=True, help="folder for the adapter")
    parser.add_argument("--base-dir", default="base", help="folder for the decomposed model")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="about 20 times LoRA's")
    parser.add_argument("--merged-dir", help="also write merged weights there, for any program")
    args = parser.parse_args()

    if not Path(args.base_dir).exists():
        report = quantize(args.model, args.base_dir, QosoraConfig(rank=args.rank))
        print(f"decomposed {len(report.layers)} layers in {report.seconds:.0f} s")

    # T5 overflows in float16; bfloat16 on a GPU, float32 on a CPU
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    base = AutoModelForSeq2SeqLM.from_pretrained(args.base_dir, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir)
    model = get_peft_model(base, OsoraConfig(task_type="SEQ_2_SEQ_LM"))
    model.print_trainable_parameters()

    def tokens(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        options = {"max_length": args.max_length, "truncation": True}
        encoded = dict(tokenizer(rows["source"], **options))
        return {**encoded, "labels": tokenizer(text_target=rows["target"], **options)["input_ids"]}

    data = load_dataset("json", data_files=args.data, split="train")
    arguments = Seq2SeqTrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1: a part of all steps
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=data.map(tokens, batched=True, remove_columns=data.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        optimizers=(create_optimizer(model, lr=args.learning_rate), None),  # paged, on packed vectors
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    if args.merged_dir:
        export_merged(args.base_dir, args.merged_dir, args.output_dir)


if __name__ == "__main__":
    main()
