"""Tiny random models as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tiny import VOCAB, make_model
from transformers import PreTrainedModel

#: Architecture, and variant, -> a model that the metadata of a GGUF file tell all about: its family, and options.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 256}),  # a row of a K-quant has 256
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma3": ("gemma3", {}),
    "gpt2": ("gpt2", {"n_positions": 1024}),
    "gpt2-untied": ("gpt2", {"n_positions": 1024, "tie_word_embeddings": False}),
    "qwen3moe": ("qwen3_moe-sparse", {"moe_intermediate_size": 768, "num_experts": 3}),
    "lfm2": ("lfm2", {}),
}
_TOKENS = ["<s>", "</s>", *(chr(33 + i) for i in range(VOCAB - 3)), "!!"]


def random_model(name: str, **options: Any) -> PreTrainedModel:
    """A random model, its biases and norms not at zero and one."""
    family, own = MODELS[name]
    model = make_model(family, **own | options)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)
    return model


def write_gguf(
    path: Path,
    name: str,
    model: PreTrainedModel,
    kinds: dict[str, Kind] | None = None,
    *,
    tokenizer: bool = True,
    head_counts: bool = True,
    extra: Callable[[gguf.GGUFWriter], Any] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does, its tensors as F32 or as `kinds` says by part of the name."""
    architecture = name.partition("-")[0]
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        if head_counts:
            writer.add_head_count_kv([0, 2] if architecture == "lfm2" else 2)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
        writer.add_rope_freq_base(10000.0)
        writer.add_key_length(getattr(config, "head_dim", None) or 8)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    elif architecture == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    elif architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if tokenizer:
        add_tokenizer(writer)
    else:
        writer.add_vocab_size(VOCAB)
    for key, values in gguf_tensors("llama" if architecture == "mpt" else architecture, model).items():
        kind = next((k for part, k in (kinds or {}).items() if part in key), Kind.F32)
        data = random_blocks(values.shape, kind) if kind == Kind.Q4_K else gguf.quantize(values, kind)
        writer.add_tensor(key, data, raw_dtype=kind)
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([3, 3, *[1] * (VOCAB - 2)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")


def random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Blocks of a kind that the gguf package cannot quantize to; their two scales are 0.5."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    data[..., :4] = np.frombuffer(np.array([0.5, 0.5], np.float16).tobytes(), np.uint8)
    return data.reshape(shape[0], -1)


def gguf_tensors(architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's tensors as llama.cpp names and lays them out."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = np.split(
                values, 2, axis=1
            )
            continue
        stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        new = f"{names.get_name(stem)}.{suffix}"
        if architecture == "llama" and (".attn_q." in new or ".attn_k." in new):
            heads = model.config.num_attention_heads if ".attn_q." in new else model.config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        elif architecture == "gemma3" and "norm" in new:
            values = values + 1
        elif architecture == "gpt2" and values.ndim == 2 and new.startswith("blk"):
            values = values.T
        elif architecture == "lfm2" and values.ndim == 3:
            values = values[:, 0]
        found[new] = np.ascontiguousarray(values)
    return found
