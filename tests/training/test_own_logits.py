"""The loss that is trained is that of the model's own logits, whatever its output layer is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PreTrainedConfig,
    ProphetNetConfig,
    RecurrentGemmaConfig,
    RemBertConfig,
)

from qosora.compat.trl import add_fused_lm_head
from qosora.inference import mean_loss
from qosora.training import own_logits
from qosora.training.own_logits import keep_own_logits

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA_4 = Llama4TextConfig(**SIZES, intermediate_size_mlp=40, num_local_experts=2, head_dim=8, num_key_value_heads=2)
#: By whether TRL's loss is theirs. Llama 4's `base_model` is none; that sees has none at all. OPT calls what is in it.
PRODUCTS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama4": _LLAMA_4,
    "llama4 that sees": Llama4Config(
        text_config=_LLAMA_4.to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "image_size": 28,
        },
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": CohereConfig(**SIZES),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES, is_decoder=True),
    "rembert": RemBertConfig(**SIZES, input_embedding_size=16, output_embedding_size=40, is_decoder=True),
    "modernbert": ModernBertDecoderConfig(**SIZES),
    "recurrent_gemma": RecurrentGemmaConfig(**SIZES, lru_width=32, attention_window_size=16, num_key_value_heads=1),
}
#: What needs more than the backbone's states: streams of n-grams.
_DECODER = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
WHOLE: dict[str, PreTrainedConfig] = {
    "prophetnet": ProphetNetConfig(
        **_DECODER, num_decoder_layers=2, num_decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
        is_encoder_decoder=False, add_cross_attention=False, dropout=0.0, ngram=2,
    )
}  # fmt: skip
CONFIGS = PRODUCTS | OTHERS | WHOLE


def made(name: str) -> Any:
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if name.endswith("sees") else AutoModelForCausalLM
    model: Any = kind.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.get_output_embeddings().weight.mul_(20)  # caps show in large logits alone
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def own_figures(model: Any, inputs: dict[str, torch.Tensor], temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of the labels, entropy and whether they are the likeliest, of the logits that it makes."""
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits.float()[:, :-1]
    targets, mask = inputs["labels"][:, 1:].clamp(min=0), inputs["labels"][:, 1:] != -100
    log_probs = F.log_softmax(logits / temperature, -1)
    chosen = log_probs.gather(-1, targets[..., None])[..., 0]
    return chosen * mask, -(log_probs.exp() * log_probs).sum(-1) * mask, (logits.argmax(-1) == targets) & mask


@pytest.mark.parametrize("name", CONFIGS)
def test_figures_and_gradients_are_those_of_the_models_logits(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qosora.inference.evaluation._LOGITS", VOCAB * 5)  # several pieces
    model, inputs = made(name), batch()
    expected = own_figures(model, inputs)
    (-expected[0].sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    keep_own_logits(model)
    found = model(**inputs, use_cache=False, fused_lm_head=True)
    for got, wanted in zip((found.log_probs, found.entropy, found.is_top1), expected, strict=True):
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.label_mask, inputs["labels"][:, 1:] != -100)
    (-found.log_probs.sum()).backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, own_logits_of(name, inputs))


def own_logits_of(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = made(name)(**inputs, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_trls_loss_is_kept_where_it_is_the_models(name: str, monkeypatch: pytest.MonkeyPatch):
    own: list[str] = []
    plain = own_logits._of_own_logits

    def recorded(*args: Any, **kwargs: Any) -> Any:
        own.append(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(own_logits, "_of_own_logits", recorded)
    model = made(name)
    add_fused_lm_head(model, outputs=("log_probs",))
    keep_own_logits(model)
    for _ in range(2):
        model(**batch(), use_cache=False, fused_lm_head=True)
    assert len(own) == (0 if name in PRODUCTS else 2)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_temperature_and_nothing_to_train_on(name: str):
    model, inputs = made(name), batch()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs",))
    keep_own_logits(model, 0.7)
    found = model(**inputs, use_cache=False, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, own_figures(model, inputs, 0.7)[0], rtol=1e-4, atol=1e-4)
    none = model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}, use_cache=False, fused_lm_head=True)
    assert not none.log_probs.any()
    assert none.loss == 0


@pytest.mark.parametrize("name", PRODUCTS | OTHERS)
def test_the_loss_of_an_evaluation_is_the_models(name: str):
    from qosora.data.tokens import Example

    model, inputs = made(name), batch()
    rows = zip(inputs["input_ids"], inputs["labels"], strict=True)
    examples = [Example(ids.numpy(), labels.numpy()) for ids, labels in rows]
    log_probs = own_figures(model, inputs)[0]
    expected = -log_probs.sum() / (inputs["labels"][:, 1:] != -100).sum()
    assert mean_loss(model, examples) == pytest.approx(expected.item(), rel=1e-4)
