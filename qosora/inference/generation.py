"""Text from prompts, in batches: greedy by default, padded on the left, ended by the model's stop tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from qosora.base import load_processor
from qosora.checkpoints import require_language_model, sees
from qosora.data import (
    Seer,
    embedding_rows,
    encode,
    learned_positions,
    pad_within,
    padded,
    refuse_broken_text,
    refuse_foreign_tokens,
    refuse_too_long,
    render,
)
from qosora.errors import CheckpointError, ConfigError, DataError, first_line

__all__ = ["Prompt", "generate", "inference", "seer_of", "stop_token_ids"]

logger = logging.getLogger("qosora")

Prompt = str | list[dict[str, Any]]  # text, or chat messages


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    template_options: Sequence[Mapping[str, Any]] | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    folder: str | Path = ".",
    written: Callable[[int, str], None] | None = None,
    streamed: Callable[[str], None] | None = None,
) -> list[str]:
    """Return what the model writes after each prompt, without special tokens.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer; left as it is.
        prompts: Texts, or lists of chat messages.
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token each time.
        top_p: With a temperature, sample from the likeliest tokens that make up this probability.
        seed: Of the sampling; the global generators are left alone if it is given.
        batch_size: Prompts on the device at once.
        chat: Whether to wrap texts into the chat template, as the user's message.
        template_options: What else the chat template gets for each prompt, such as tools; for prompts without images.
        images: Of each prompt, for a model that sees: what `qosora.data.vision.open_image` takes.
        folder: Where their paths begin.
        written: Called with the index of a prompt and what was written after it, as soon as that is known.
        streamed: Called with each piece of the text after a single prompt, as it comes.

    Raises:
        CheckpointError: It is no causal language model.
        ConfigError: An option is out of range.
        DataError: A prompt is empty or no text, cannot be rendered, or does not fit the model; or an image cannot be
            used.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or batch_size < 1:
        raise ConfigError(
            "max_new_tokens and batch_size must be at least 1, temperature at least 0 and top_p in (0, 1]; got "
            f"{max_new_tokens}, {batch_size}, {temperature}, {top_p}"
        )
    if streamed is not None and len(prompts) != 1:
        raise ConfigError(f"the answer to one prompt can be streamed, not those to {len(prompts)}")
    require_language_model(model.config, model.name_or_path, "generation")
    if images is not None and len(images) != len(prompts):
        raise ConfigError(
            f"images must be given for each of the {len(prompts)} prompts, got {len(images)} lists of them"
        )
    if images is not None and any(images):
        batches = _seen(model, tokenizer, prompts, images, Path(folder), chat, batch_size)
    else:
        batches = _read(model, tokenizer, prompts, template_options or [{}] * len(prompts), chat, batch_size)
    texts = [""] * len(prompts)
    configs: dict[int, GenerationConfig] = {}  # by the longest prompt
    with inference(model), _seeded(seed):
        for chosen, inputs, longest in batches:
            if longest not in configs:
                new_tokens = _within_positions(model, longest, max_new_tokens)
                configs[longest] = _generation_config(model, tokenizer, new_tokens, temperature, top_p)
            streamer = None if streamed is None else _Streamer(tokenizer, streamed)
            new = _continue(model, inputs, configs[longest], streamer)
            for i, ids in zip(chosen, new, strict=True):
                texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
                if written is not None:
                    written(i, texts[i])
    return texts


def stop_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end generation: the model's and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and back.

    Autocast is on where 16-bit weights and float32 `modules_to_save`, as in training, would not go together.
    """
    training, dtype = model.training, model.dtype
    device = model.get_input_embeddings().weight.device.type
    mixed = dtype != torch.float32 and any(
        ".modules_to_save." in name and p.dtype == torch.float32 for name, p in model.named_parameters()
    )
    model.eval()
    try:
        # not inference_mode: tensors that are cached meanwhile must serve training, too
        with torch.no_grad(), torch.autocast(device, dtype) if mixed else nullcontext():
            yield
    finally:
        model.train(training)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def seer_of(
    source: str | Path,
    vocabulary: int,
    *,
    completion_only: bool = True,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Seer:
    """Return what makes tokens and pixels for a model that sees.

    Args:
        source: With the files of its processor.
        vocabulary: Number of its embeddings.
        completion_only: As `Seer` has it.
        dtype: Likewise.
        trust_remote_code: Whether to run code that the folder brings.

    Raises:
        CheckpointError: There is no processor.
    """
    processor = load_processor(source, trust_remote_code=trust_remote_code)
    pad_within(processor.tokenizer, vocabulary)
    return Seer(processor, completion_only=completion_only, dtype=dtype)


#: Numbers of some prompts, what the model takes of them, and the tokens of the longest of all.
_Batch = tuple[list[int], dict[str, torch.Tensor], int]


def _read(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: Sequence[Mapping[str, Any]],
    chat: bool, size: int,
) -> Iterator[_Batch]:  # fmt: skip
    """Give prompts of text in batches."""
    encoded = [
        _encode(tokenizer, prompt, chat, number, given)
        for number, (prompt, given) in enumerate(zip(prompts, options, strict=True), 1)
    ]
    refuse_foreign_tokens(encoded, embedding_rows(model), tokenizer.name_or_path)
    by_length = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))  # what needs most memory first
    pad = _pad_token(model, tokenizer)
    for start in range(0, len(encoded), size):
        chosen = by_length[start : start + size]
        ids = padded([encoded[i] for i in chosen], pad, left=True)
        mask = padded([[1] * len(encoded[i]) for i in chosen], 0, left=True)
        yield chosen, {"input_ids": ids, "attention_mask": mask}, len(encoded[by_length[0]])


def _seen(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], images: Sequence[Sequence[Any]],
    folder: Path, chat: bool, size: int,
) -> Iterator[_Batch]:  # fmt: skip
    """Give prompts with images in batches, those without after them: a processor takes all with some, or none."""
    if not sees(model.config):
        raise DataError("the prompts have images, and the model takes none; leave them out")
    seer = seer_of(tokenizer.name_or_path, embedding_rows(model), dtype=model.dtype)
    rows = []
    for number, (prompt, of_it) in enumerate(zip(prompts, images, strict=True), 1):
        _require_text(prompt, number)
        asked = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
        rows.append({"prompt": asked, "images": of_it, "folder": folder})
    for with_images in (True, False):
        numbers = [i for i, of_it in enumerate(images) if bool(of_it) is with_images]
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            try:
                inputs = seer.prompts([rows[i] for i in chosen])
            except DataError as error:
                named = ", ".join(str(i + 1) for i in chosen)
                raise DataError(f"prompt{'s' * (len(chosen) > 1)} {named}: {error}") from None
            yield chosen, inputs, inputs["input_ids"].shape[1]


def _within_positions(model: Any, longest: int, max_new_tokens: int) -> int:
    """Return how many tokens can be written: as many as asked for, or as a table of positions has room for."""
    positions = learned_positions(model)
    refuse_too_long(longest + 1, positions, "shorten the longest prompt, to leave room for an answer")
    if positions is None or longest + max_new_tokens <= positions:
        return max_new_tokens
    logger.warning("answers end after %d tokens, where the model's %d positions do", positions - longest, positions)
    return positions - longest


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool, number: int, options: Mapping[str, Any]
) -> list[int]:
    _require_text(prompt, number)
    if isinstance(prompt, str) and not chat:
        ids = encode(tokenizer, [prompt])[0]
        if ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1:  # some tokenizers end every text
            ids.pop()
        return ids
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give plain prompts, or the chat version's tokenizer")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = render(tokenizer, messages, options, generation=True)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from None
    return encode(tokenizer, [text], special_tokens=False)[0]


def _require_text(prompt: Prompt, number: int) -> None:
    if not prompt:
        raise DataError(f"prompt {number} is empty")
    try:
        refuse_broken_text(prompt)
    except DataError as error:
        raise DataError(f"prompt {number} {error}") from None


def _pad_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with. Which makes no difference, but the model must have it: some add [PAD] beyond it."""
    stops, rows = stop_token_ids(model, tokenizer), embedding_rows(model)
    return next((i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None and i < rows), 0)


def _generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model, tokenizer) or None,
        pad_token_id=_pad_token(model, tokenizer),
        **{"do_sample": False, **sampling},
    )


class _Streamer(TextStreamer):
    """Hands text on as soon as its last word is whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece."""
        if text:
            self.show(text)


def _continue(
    model: Any, inputs: Mapping[str, torch.Tensor], config: GenerationConfig, streamer: TextStreamer | None = None
) -> list[list[int]]:
    """Return the new tokens after each prompt, without the stop token."""
    device = model.get_input_embeddings().weight.device
    there = {name: tensor.to(device) for name, tensor in inputs.items()}
    try:
        written = model.generate(**there, generation_config=config, streamer=streamer)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        _blame_generation_config(model, error)
        raise
    new = written[:, inputs["input_ids"].shape[1] :].tolist()
    stops = set(config.eos_token_id or ())
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in new]


def _blame_generation_config(model: Any, error: Exception) -> None:
    """Raise a `CheckpointError` if the model's generation_config.json has options, which transformers takes unseen."""
    expected = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    given = {key: value for key, value in model.generation_config.to_diff_dict().items() if key not in expected}
    if given:
        raise CheckpointError(
            f"{Path(model.name_or_path) / 'generation_config.json'}: transformers cannot generate with its {given} "
            f"({type(error).__name__}: {first_line(error)}); correct or remove them"
        ) from error
