"""Take an adapter out of qosora, as a checkpoint and as a LoRA, and generate with both, by transformers and PEFT alone.

    python examples/export_merged.py my-adapter exported --original meta-llama/Llama-2-7b-hf

In three lines, without the command line:

    from qosora import export_merged
    report = export_merged("my-base", "my-model", "my-adapter", verify=True)
    print(report.verification)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qosora import export_lora, export_merged
from qosora.checkpoints import split_source


def main() -> None:
    """Export, load, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder that `qosora train` or save_pretrained wrote")
    parser.add_argument("output", type=Path, help="folder for both exports")
    parser.add_argument("--base", help="the adapter's base, where it is not where the adapter says")
    parser.add_argument("--original", help="the model that the base was made of, where the base does not tell")
    parser.add_argument("--prompt", default="Question: What is 2 + 3? Answer:")
    args = parser.parse_args()

    base, _ = split_source(args.adapter, args.base)
    merged = export_merged(base, args.output / "merged", args.adapter, verify=True)
    lora = export_lora(base, args.output / "lora", args.adapter, original=args.original, verify=True)
    for report in (merged, lora):
        print(f"{report.output}: {report.total_bytes:,} bytes, {report.verification}")

    # From here on nothing is qosora's. The LoRA goes onto the original model, not onto the base.
    tokenizer = AutoTokenizer.from_pretrained(merged.output)
    show(AutoModelForCausalLM.from_pretrained(merged.output), tokenizer, args.prompt)
    original = AutoModelForCausalLM.from_pretrained(lora.original)
    show(PeftModel.from_pretrained(original, lora.output), tokenizer, args.prompt)


def show(model: Any, tokenizer: Any, prompt: str) -> None:
    """Print what a model writes after a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"{type(model).__name__}: {tokenizer.decode(written, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
