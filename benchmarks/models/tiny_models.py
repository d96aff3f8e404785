"""Tiny random models of every architecture of transformers: the default configuration, made small by the names of keys.

What a number means is told by its name, as all configurations have these in common. `TINY` has what cannot be told.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

__all__ = ["KINDS", "architectures", "inputs_of", "tiny_model"]

#: Kinds of models: the table of transformers that lists them.
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "tagger": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
#: By the name of a key, the first that matches: its value in a tiny model.
RULES: tuple[tuple[str, int], ...] = (
    (r"unpadded_vocab_size", 120),
    (r".*vocab_size.*|n_vocab|.*group_vocab", 128),
    (r"(num_)?(hidden|encoder|decoder|conformer)?_?(n_)?layers?|(num_|n_)(hidden_|encoder_|decoder_)?layers?|depth|"
     r"depths|num_hidden_blocks|num_blocks|encoder_num_layers|num_transformer_layers|num_layers_per_stack", 2),
    (r"(moe_k|moe_topk|num_experts_per_tok(en)?|top_k_experts|n_experts_per_tok|num_selected_experts)", 2),
    (r"(n|num)_(routed_|local_)?experts|moe_num_experts", 4),
    (r"n_group|topk_group|num_expert_group|(moe_)?num_shared_experts|n_shared_experts|mamba_n_groups|n_groups", 1),
    (r"(moe_|expert_|shared_expert_|moe_shared_expert_|shared_)?(ffn_)?(intermediate|expert)_size|expert_ffn_hidden_size",
     48),
    (r"(moe|shared_expert|moe_shared_expert|shared|dense)_intermediate_size", 48),
    (r"intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|ffn_hidden_size|mlp_hidden_size|.*ffn_hidden_dim",
     96),
    (r"(q|kv|o|gate)_lora_rank|.*lowrank|gated_norm_rank|router_hidden_size|laurel_rank|adapter_rank|d_rel", 16),
    (r"qk_head_dim", 32),
    (r"rotary_dim", 8),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|.*head_dim|kv_channels|dim_head|d_kv|d_head|mamba_d_head|mamba_headdim|.*head_size",
     16),
    (r"index_n_heads|index_head_dim", 16),
    (r"index_topk.*", 8),
    (r".*num_key_value_heads|.*num_kv_heads|swa_num_key_value_heads|num_query_groups|multi_query_group_num", 2),
    (r".*(attention_|attn_)heads|n_head|n_heads|num_heads|.*num_attention_heads|num_heads|linear_num_.*heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"n_mamba_heads", 2),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank", 8),
    (r"mamba_d_ssm", 128),
    (r".*chunk_size(?<!feed_forward)|block_size|mamba_chunk_size", 16),
    (r"hidden_size_per_layer_input", 16),
    (r".*hidden_size.*|d_model|n_embd|embed_dim|.*embed_proj_dim|dim|emb_dim|embedding_size|embedding_dim|hidden_dim|"
     r"projection_dim|out_hidden_size|model_dim|attention_hidden_size|backbone_hidden_size|.*embed_dim", 64),
    (r"max_(position_embeddings|target_positions|seq_len)|n_positions|n_ctx|context_length|model_max_length", 128),
    (r"max_source_positions", 32),
    (r"image_size|input_size", 32),
    (r"num_mel_bins", 16),
    (r"spatial_merge_size|num_buckets", 2),
)  # fmt: skip
#: Of the halves of a head, those that are turned by each of an image's three positions.
_TURNED: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
#: What the rules do not tell, by model type (or by type of a part) and key.
TINY: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"per_layer_config": {}},
    "gemma4_unified_text": {"per_layer_config": {}},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
        "head_dim": 32,
        "num_key_value_heads": 4,
        "use_dsa": None,
        "per_layer_config": {
            1: {
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "head_dim": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 16,
            }
        },
    },
    "hunyuan_v1_dense": {"head_dim": 16, "num_attention_heads": 4},
    "hunyuan_v1_moe": {"head_dim": 16, "num_attention_heads": 4, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "kv_channels": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "longcat_flash": {"zero_expert_num": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "hidden_size": 64},
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 3],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "feed_forward_size": 96,
    },
    "recurrent_gemma": {"lru_width": 64, "intermediate_size": 192, "block_types": ["recurrent", "attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "qwen4_exp_text": {
        "ple_embed_dim": 16,
        "ple_vocab_size": 128,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
        "ple_layer_ids": [1],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "eos_token_id": 2,
    },
    **{
        model: {"rope_parameters": _TURNED}
        for model in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text")
    },
    "glm4v_moe_text": {"rope_parameters": {**_TURNED, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_TURNED, "mrope_section": [3, 3, 2]}},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGAZ": 91}},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|visual token 000000|>": 91}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "step3p5": {"sliding_window": 8},
    "mistral4": {"head_dim": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 4},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {**_TURNED, "mrope_section": [2, 2, 2, 2]}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
    },
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "esmc": {"num_key_value_heads": 4},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_output_size": 64},
    "glm5_next_text": {"index_kpool": 4},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    # one tensor for queries, keys and values, cut in three
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "speecht5": {"mask_time_prob": 0.0, "apply_spec_augment": False},
    "wav2vec2": {"mask_time_prob": 0.0, "apply_spec_augment": False},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "t5": {"decoder_start_token_id": 0},
    "esm": {"vocab_size": 128, "mask_token_id": 4, "pad_token_id": 1},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64, "embedding_size": 64},
    "lilt": {"hidden_size": 96},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
}


#: Models that take (frames, features), and what their configuration calls the number of features.
_FRAMES_FIRST = {
    "canary": "num_mel_bins",
    "cohere_asr": "num_mel_bins",
    "speech_to_text": "input_feat_per_channel",
    "seamless_m4t": "feature_projection_input_dim",
    "seamless_m4t_v2": "feature_projection_input_dim",
}


def architectures(kind: str) -> Iterator[tuple[str, str]]:
    """Give model types and names of classes of a kind."""
    for model_type, names in getattr(modeling_auto, KINDS[kind]).items():
        yield model_type, names if isinstance(names, str) else names[0]


def tiny_model(model_type: str, class_name: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of random weights that are no multiples of what initialization gives."""
    config = CONFIG_MAPPING[model_type]()
    cls = getattr(transformers, class_name)
    if type(config) is not cls.config_class and cls.config_class is not None:  # a part of it is what is built
        parts = (getattr(config, key, None) for key in config.sub_configs)
        config = next((part for part in parts if type(part) is cls.config_class), config)
    tiny = type(config).from_dict(_shrunk(config.to_dict()))
    for part in (tiny, *(getattr(tiny, key, None) for key in getattr(tiny, "sub_configs", {}))):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            wanted = name == "pad_token_id" or getattr(part, name, None) is not None
            if isinstance(part, PreTrainedConfig) and wanted and hasattr(part, "vocab_size"):
                setattr(part, name, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}[name])
    tiny.use_cache = False
    torch.manual_seed(seed)
    model: PreTrainedModel = cls(tiny).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def inputs_of(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return what a model can be run on: tokens, or what it has instead, and first tokens of the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    ids[:, -1] = 2  # of some classifiers, the state of the last token of a text
    config = model.config
    if config.model_type == "perceiver":
        found = {"inputs": ids, "attention_mask": torch.ones_like(ids)}
    elif model.main_input_name == "input_ids" or config.model_type in ("git",):
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif model.main_input_name == "pixel_values":
        size = getattr(getattr(config, "vision_config", None) or getattr(config, "encoder", config), "image_size", 32)
        found = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
        if "input_ids" in inspect.signature(model.forward).parameters:
            found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif model.main_input_name == "input_features":
        length = 2 * getattr(config, "max_source_positions", 32)
        encoder = getattr(config, "encoder_config", config)
        bins = getattr(encoder, _FRAMES_FIRST.get(config.model_type, "num_mel_bins"), 16)
        shape = (length, bins) if config.model_type in _FRAMES_FIRST else (bins, length)
        found = {"input_features": torch.randn(2, *shape, generator=generator)}
    else:
        found = {model.main_input_name: torch.randn(2, 1600, generator=generator)}
    if "bbox" in inspect.signature(model.forward).parameters:  # where each token is on a page
        box = [0.1, 0.2, 0.3, 0.4] if config.model_type in ("udop", "bros") else [1, 2, 30, 40]
        found["bbox"] = torch.tensor(box).expand(*ids.shape, 4).contiguous()
    if config.model_type == "molmo2":
        found["mm_token_type_ids"] = torch.zeros_like(ids)
    if config.is_encoder_decoder and not type(model).__name__.endswith("Classification"):
        found["decoder_input_ids"] = ids[:, :8]
    return found


def _shrunk(values: Mapping[str, Any], model_type: str = "") -> dict[str, Any]:
    model_type = values.get("model_type", model_type)
    values = {**copy.deepcopy(dict(values)), **TINY.get(model_type, {})}
    fixed = set(TINY.get(model_type, {}))
    layers = next((values[k] for k in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if k in values), None)
    kept, lists = _kept_layers(values, layers)
    for key, value in list(values.items()):
        if key in fixed:
            values[key] = TINY[model_type][key]
            continue
        if key == "per_layer_config" and isinstance(layers, int):
            own = {int(i): each for i, each in (value or {}).items()}
            of_kept = enumerate(kept or [0, layers - 1])
            values[key] = {str(new): _shrunk(own[old]) for new, old in of_kept if old in own}
        elif isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            values[key] = _shrunk(value, f"{model_type}.{key}")
        elif key in lists:
            values[key] = [_small(key, value[i]) for i in kept]
        elif key == "mrope_section":
            values[key] = [2, 3, 3]  # of half a head's size
        elif isinstance(value, list) and value and type(value[0]) is int and re.search("hidden|depth|channels", key):
            values[key] = [min(v, 64) for v in value]
        else:
            values[key] = _small(key, value)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # one for each, after the low rank
        values["num_key_value_heads"] = values["num_attention_heads"]
    if kept and len(kept) != 2:
        for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
            if key in values:
                values[key] = len(kept)
    return values


def _kept_layers(values: Mapping[str, Any], layers: Any) -> tuple[list[int], set[str]]:
    """Return which layers represent all kinds that there are, and the keys that list something for each."""
    if not isinstance(layers, int):
        return [], set()
    lists = {k for k, v in values.items() if isinstance(v, list) and len(v) == layers and layers > 3}
    kinds: dict[str, int] = {}
    for i in range(layers):
        kinds.setdefault(repr([values[k][i] for k in sorted(lists) if not isinstance(values[k][i], float)]), i)
    kept = sorted(kinds.values())[:4]
    kept += [layers - 1] * (2 - len(kept))
    return (kept, lists) if lists else ([], set())


def _small(key: Any, value: Any) -> Any:
    if type(value) is not int or value <= 1 or not isinstance(key, str):
        return value
    if re.search(r"token_(id|index)$|_id$", key):
        return value if value < 100 else 100 + value % 28
    return next((min(value, small) for rule, small in RULES if re.fullmatch(rule, key)), value)
