"""Make the demo's model and data set: `python examples/make_demo_model.py`.

Pre-trains a very small Llama-architecture causal LM on the synthetic text of `demo_world.py` and writes
`qosora/demo/assets/model/` (a plain Hugging Face checkpoint) and `qosora/demo/assets/{train,test}.jsonl` (the
fine-tuning task, columns `prompt` and `completion`). Nothing is downloaded; the same seed, thread count and
versions give the same files. Takes about 10 minutes on one CPU core; `--steps 50` is a try-out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import demo_world
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "qosora" / "demo" / "assets"
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SEQUENCE_LENGTH = 160
GIVEN_WEIGHT = 0.1  # most of what is given is random: little can be learned from predicting it
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\\nAnswer:' }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="right",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; every Linear of its layers is at least 64 in both dimensions."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(document: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Tokenize a document line by line, closed by EOS; returns token ids and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    lines = document.splitlines(keepends=True)
    for line, line_ids in zip(lines, tokenizer(lines)["input_ids"], strict=True):
        ids += line_ids
        weights += [GIVEN_WEIGHT if line.startswith(demo_world.GIVEN) else 1.0] * len(line_ids)
    return [*ids, tokenizer.eos_token_id][:SEQUENCE_LENGTH], [*weights, 1.0][:SEQUENCE_LENGTH]


def packed_rows(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack whole documents into rows: token ids and loss weights, each (rows, SEQUENCE_LENGTH), padded."""
    rows: list[tuple[list[int], list[float]]] = [([], [])]
    for document in documents:
        ids, weights = encode(document, tokenizer)
        if len(rows[-1][0]) + len(ids) > SEQUENCE_LENGTH:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend(weights)
    gaps = [SEQUENCE_LENGTH - len(ids) for ids, _ in rows]
    padded_ids = [ids + [tokenizer.pad_token_id] * gap for (ids, _), gap in zip(rows, gaps, strict=True)]
    padded_weights = [weights + [0.0] * gap for (_, weights), gap in zip(rows, gaps, strict=True)]
    return torch.tensor(padded_ids), torch.tensor(padded_weights)


def batches(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches of fresh text for ever: no document is repeated on purpose."""
    for chunk in itertools.count(100):
        documents = demo_world.pretraining_documents(2000, args.seed + chunk)
        pairs = zip(*(t.split(args.batch_size) for t in packed_rows(documents, tokenizer)), strict=True)
        yield from (pair for pair in pairs if len(pair[0]) == args.batch_size)


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, its mean weighted."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def make_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    After 200 steps 91 % of the answer tokens about messages were right, against 81 % with AdamW alone.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    """Train with warm-up and cosine decay; returns the running mean of the loss at the end."""
    warmup = max(1, args.steps // 20)

    def scale(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps)))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)

    optimizers = make_optimizers(model, args)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    mean, start = 0.0, time.perf_counter()
    for step, (ids, weights) in enumerate(itertools.islice(batches(tokenizer, args), args.steps)):
        loss = weighted_loss(model, ids, weights)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {mean:.3f}  {time.perf_counter() - start:6.0f} s", flush=True)
    return mean


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, readme: str) -> None:
    """Write the checkpoint in bf16, as most models are published, with its tokenizer and README."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_rows(rows: list[demo_world.Row], path: Path) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def readme_text(model: LlamaForCausalLM, args: argparse.Namespace, loss: float) -> str:
    """Say what the model is and how it was made."""
    return f"""# qosora demo model

A causal LM of {model.num_parameters():,} parameters (Llama architecture) for `qosora demo` and the tests.
It is a toy: it knows {len(demo_world.NAMES)} names, {len(demo_world.PLACES)} places, {len(demo_world.GOODS)} goods.

Made by `python examples/make_demo_model.py --steps {args.steps} --seed {args.seed}` from synthetic text alone
(`examples/demo_world.py`): stories and order messages with questions answered in full sentences, number
words, small sums, word lists and opposites. No outside text, model or data set was used; the licence is the
project's. Trained for {args.steps} steps of {args.batch_size} rows of {SEQUENCE_LENGTH} tokens in fp32, stored in bf16;
last training loss {loss:.3f}.

`../train.jsonl` and `../test.jsonl` hold a task that it was *not* trained on: turn an order message into a
ticket, `<place>: <number> <colour> <goods> for <name>`. `prompt + completion + <eos>` is a training sequence;
the tokenizer adds no special tokens.
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the model and the data set of `qosora demo`.")
    parser.add_argument("--steps", type=int, default=1200, help="pre-training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's peak (default: %(default)s)")
    parser.add_argument("--muon-learning-rate", type=float, default=0.02, help="(default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="at most (default: %(default)s)")
    parser.add_argument("--train-rows", type=int, default=1000, help="rows of train.jsonl (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=128, help="rows of test.jsonl (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of text, weights and rows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ASSETS, help="the assets folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Make everything and say where it lies."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(demo_world.pretraining_documents(5000, seed=args.seed + 1), args.vocab_size)
    model = make_model(tokenizer)
    loss = pretrain(model, tokenizer, args)
    write_model(model, tokenizer, args.output / "model", readme_text(model, args, loss))
    rows = demo_world.ticket_rows(args.train_rows + args.test_rows, seed=args.seed + 7)
    write_rows(rows[: args.train_rows], args.output / "train.jsonl")
    write_rows(rows[args.train_rows :], args.output / "test.jsonl")
    print(f"wrote {args.output}: {model.num_parameters():,} parameters, {len(rows)} rows")


if __name__ == "__main__":
    main()
