"""The models that can be planned for: built-in shapes, folders, config files, hub ids. No weights are read.

The built-in ones are the published `config.json` of the models, as far as it decides about memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qosora.checkpoints import expanded
from qosora.errors import CheckpointError, near_miss

__all__ = ["SHAPES", "model_config"]


def _shape(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": length, **more,
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "llama-3-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 8192),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3.1-70b": _shape("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, **_TIED),
    "llama-3.2-3b": _shape("llama", 3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, **_TIED),
    "tinyllama-1.1b": _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, sliding_window=None),
    "mistral-nemo-12b": _shape("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128, sliding_window=None),
    "mistral-small-24b": _shape("mistral", 5120, 32768, 40, 32, 8, 131072, 32768, head_dim=128, sliding_window=None),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, **_TIED),
    "qwen2.5-3b": _shape("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, **_TIED),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072),
    "qwen2.5-14b": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072),
    "qwen2.5-32b": _shape("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, head_dim=128, **_TIED),
    "qwen3-1.7b": _shape("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, head_dim=128, **_TIED),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, head_dim=128, **_TIED),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128),
    "qwen3-14b": _shape("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, head_dim=128),
    "qwen3-32b": _shape("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, head_dim=128),
    "gemma-3-270m": _shape("gemma3_text", 640, 2048, 18, 4, 1, 262144, 32768, head_dim=256, sliding_window=512),
    "gemma-3-1b": _shape("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, head_dim=256, sliding_window=512),
    "gemma-3-4b": _shape("gemma3_text", 2560, 10240, 34, 8, 4, 262208, 131072, head_dim=256, sliding_window=1024),
    "gemma-3-12b": _shape("gemma3_text", 3840, 15360, 48, 16, 8, 262208, 131072, head_dim=256, sliding_window=1024),
    "gemma-3-27b": _shape("gemma3_text", 5376, 21504, 62, 32, 16, 262208, 131072, head_dim=128, sliding_window=1024),
    "mixtral-8x7b": _shape(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, 32768,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    ),
    "qwen3-30b-a3b": _shape(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, 40960, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "qwen3-235b-a22b": _shape(
        "qwen3_moe", 4096, 12288, 94, 64, 4, 151936, 40960, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, norm_topk_prob=True,
    ),
    "gpt-oss-20b": _shape("gpt_oss", 2880, 2880, 24, 64, 8, 201088, 131072, head_dim=64, num_local_experts=32),
    "gpt-oss-120b": _shape("gpt_oss", 2880, 2880, 36, 64, 8, 201088, 131072, head_dim=64, num_local_experts=128),
    "phi-3-mini": _shape("phi3", 3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047),
    "phi-4": _shape("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, sliding_window=None, pad_token_id=None),
}  # fmt: skip


def model_config(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a model.

    Args:
        model: A name in `SHAPES`, a folder with `config.json`, such a file, or a hub id.
        trust_remote_code: Whether to run model code that the folder brings.

    Raises:
        CheckpointError: There is no such model.
    """
    name, path = expanded(model), Path(expanded(model))
    if name.lower() in SHAPES:
        shape = dict(SHAPES[name.lower()])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of a model, or one of {_names()}")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if path.exists():
            raise CheckpointError(f"{path}: no config.json that transformers knows ({_first(error)})") from error
        raise CheckpointError(
            f"{name!r} is no file or folder, the hub gives no config.json for it ({_first(error)}), and no built-in "
            f"shape has that name{near_miss(name.lower(), SHAPES)}. The shapes: {_names()}"
        ) from error


def _names() -> str:
    return ", ".join(SHAPES)


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
