"""Fine-tune a speech recognizer (Whisper, Moonshine) from recordings and what is said, with transformers' own trainer.

    pip install soundfile
    python examples/transcribe.py --model openai/whisper-small --data said.jsonl --output-dir my-adapter

The data are JSON lines with `audio`, the path of a WAV, FLAC, Ogg or MP3 file beside the data, and `text`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from qosora import OsoraConfig, QosoraConfig, create_optimizer, export_merged, quantize


def heard(path: Path, rate: int) -> Any:
    """Return a recording as one channel of samples, float32."""
    samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    if found != rate:
        raise SystemExit(
            f"{path} has {found} samples a second, and the model hears {rate}: "
            f"ffmpeg -i {path} -ar {rate} {path.with_suffix('.wav').name}"
        )
    return samples.mean(1)


def collated(rows: list[dict[str, Any]], *, folder: Path, extractor: Any, tokenizer: Any, start: int) -> dict[str, Any]:
    """Return a batch: what is heard, and what is to be written, whose padding has no loss."""
    sounds = [heard(folder / row["audio"], extractor.sampling_rate) for row in rows]
    batch = dict(extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
    texts = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    if bool((labels[:, 0] == start).all()):  # the model puts it there itself
        labels = labels[:, 1:]
    return {**batch, "labels": labels}


def main() -> None:
    """Parse the arguments, decompose the model if that was not done before, train, save, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-small", help="folder or hub id of the original model")
    parser.add_argument("--data", required=True, help="JSON lines with audio and text")
    parser.add_argument("--output-dir", required=True, help="folder for the adapter")
    parser.add_argument("--base-dir", default="base", help="folder for the decomposed model")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="about 20 times LoRA's")
    parser.add_argument("--merged-dir", help="also write merged weights there, for any program")
    args = parser.parse_args()

    if not Path(args.base_dir).exists():
        report = quantize(args.model, args.base_dir, QosoraConfig(rank=args.rank))
        print(f"decomposed {len(report.layers)} layers in {report.seconds:.0f} s")

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    base = AutoModelForSpeechSeq2Seq.from_pretrained(args.base_dir, dtype=dtype)
    extractor = AutoFeatureExtractor.from_pretrained(args.base_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir)
    model = get_peft_model(base, OsoraConfig(task_type=None))  # PEFT's other classes pass input_ids on
    model.print_trainable_parameters()

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
        remove_unused_columns=False,  # the collator reads the recordings
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        data_collator=partial(
            collated,
            folder=Path(args.data).parent,
            extractor=extractor,
            tokenizer=tokenizer,
            start=base.config.decoder_start_token_id,
        ),
        optimizers=(create_optimizer(model, lr=args.learning_rate), None),  # paged, on packed vectors
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    if args.merged_dir:
        export_merged(args.base_dir, args.merged_dir, args.output_dir)


if __name__ == "__main__":
    main()
