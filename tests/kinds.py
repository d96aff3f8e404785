"""Tiny configurations of models that are no plain language models: classifiers, and models that see."""

from __future__ import annotations

from typing import Any

import transformers as t

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300,
    "max_position_embeddings": 128,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"head_dim": 16}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_QWEN_IDS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}


def _rope(*section: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}}


CLASSIFIERS: dict[str, t.PreTrainedConfig] = {
    "BertForSequenceClassification": t.BertConfig(**_SIZES),
    "RobertaForSequenceClassification": t.RobertaConfig(**_SIZES),
    "XLMRobertaForTokenClassification": t.XLMRobertaConfig(**_SIZES),
    "DistilBertForSequenceClassification": t.DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=3, n_heads=4, vocab_size=300, max_position_embeddings=128
    ),
    "ElectraForSequenceClassification": t.ElectraConfig(**_SIZES, embedding_size=32),
    "DebertaV2ForSequenceClassification": t.DebertaV2Config(
        **_SIZES, relative_attention=True, position_buckets=32, pos_att_type=["p2c", "c2p"], pooler_hidden_size=64
    ),
    "ModernBertForSequenceClassification": t.ModernBertConfig(**_SIZES, **_ENDS),
    "LlamaForSequenceClassification": t.LlamaConfig(**_DECODER),
    "MistralForSequenceClassification": t.MistralConfig(**_DECODER, num_labels=1),  # of rewards
    "Qwen3ForSequenceClassification": t.Qwen3Config(**_DECODER, **_HEADS),
    "Qwen3ForTokenClassification": t.Qwen3Config(**_DECODER, **_HEADS),
    "Gemma3TextForSequenceClassification": t.Gemma3TextConfig(**_DECODER, **_HEADS),
    "GPT2ForSequenceClassification": t.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=300, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}
SEEING: dict[str, t.PreTrainedConfig] = {
    "Qwen2VLForConditionalGeneration": t.Qwen2VLConfig(
        text_config=_DECODER | _rope(2, 3, 3), vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64,
        "num_heads": 4}, **_QWEN_IDS,
    ),
    "Qwen2_5_VLForConditionalGeneration": t.Qwen2_5_VLConfig(
        text_config=_DECODER | _rope(2, 3, 3), vision_config=_QWEN_TOWER | {"fullatt_block_indexes": [1]}, **_QWEN_IDS
    ),
    "Qwen3VLForConditionalGeneration": t.Qwen3VLConfig(
        text_config=_DECODER | _HEADS | _rope(3, 3, 2), vision_config=_QWEN_TOWER | {"deepstack_visual_indexes": [0]},
        **_QWEN_IDS,
    ),
    "Gemma3ForConditionalGeneration": t.Gemma3Config(
        text_config={**_DECODER, **_HEADS, "sliding_window": 64}, vision_config=_TOWER, image_token_index=290,
        mm_tokens_per_image=4,
    ),
    "LlavaForConditionalGeneration": t.LlavaConfig(
        text_config=t.LlamaConfig(**_DECODER), vision_config=t.CLIPVisionConfig(**_TOWER), image_token_id=290
    ),
    "SmolVLMForConditionalGeneration": t.SmolVLMConfig(
        text_config=t.LlamaConfig(**_DECODER), vision_config=_TOWER, image_token_id=290, scale_factor=2
    ),
    "InternVLForConditionalGeneration": t.InternVLConfig(
        text_config=t.Qwen2Config(**_DECODER),
        vision_config=_TOWER | {"image_size": [28, 28], "patch_size": [14, 14]}, image_token_id=290,
    ),
    "PaliGemmaForConditionalGeneration": t.PaliGemmaConfig(
        text_config=t.GemmaConfig(**_DECODER, **_HEADS), vision_config=t.SiglipVisionConfig(**_TOWER),
        image_token_id=290, projection_dim=64,
    ),
}  # fmt: skip
for _kinds in (CLASSIFIERS, SEEING):
    for _name, _config in _kinds.items():
        _config.architectures = [_name]
