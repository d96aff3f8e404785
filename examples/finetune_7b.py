"""Fine-tune a 7B model on one 24 GB GPU, the way a QLoRA script does it: transformers, PEFT, TRL, and two configs.

    python examples/finetune_7b.py --model meta-llama/Llama-2-7b-hf --data train.jsonl --output-dir my-adapter

The data are JSON lines with `prompt` and `completion`, or `messages`. The base is decomposed once and kept in
`--base-dir`; later runs load it from there. `qosora train` does it with less typing,
and trains chats on the assistant's turns alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qosora import OsoraConfig, QosoraConfig
from qosora.base import quantize
from qosora.training import trainer_optimizer


def main() -> None:
    """Parse the arguments, decompose the model if that was not done before, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf", help="folder or hub id of the original model")
    parser.add_argument("--data", required=True, help="JSON lines with prompt and completion, or messages")
    parser.add_argument("--output-dir", required=True, help="folder for the adapter")
    parser.add_argument("--base-dir", default="base", help="folder for the decomposed model")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()

    if not Path(args.base_dir).exists():
        report = quantize(args.model, args.base_dir, QosoraConfig(rank=args.rank))
        print(f"decomposed {len(report.layers)} layers in {report.seconds:.0f} s")

    # bfloat16 without autocast: QosoraLinear keeps its vectors in float32 and computes in the input's dtype.
    model = AutoModelForCausalLM.from_pretrained(args.base_dir, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir)

    sft = SFTConfig(
        output_dir=args.output_dir,
        max_length=args.max_length,
        max_steps=args.max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        learning_rate=1e-2,  # about 20 times LoRA's
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1: a part of all steps
        bf16=False,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to="none",
    )
    trainer = SFTTrainer(
        model,
        args=sft,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
        peft_config=OsoraConfig(),
        optimizer_cls_and_kwargs=trainer_optimizer(sft),
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    trainer.model.print_trainable_parameters()


if __name__ == "__main__":
    main()
