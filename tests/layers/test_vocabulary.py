"""Quantized embeddings and output layer: rows, logits and gradients are those of the whole matrix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exports import tensors_of
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_tensors,
    decompose,
    load,
    logits,
    make_base,
    make_checkpoint,
    perturbed,
    relative_difference,
    rounding,
    token_ids,
)
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from qosora.base import load_base, quantize
from qosora.base.describe import describe, verify
from qosora.compat.trl import add_fused_lm_head, loss_chunks
from qosora.config import OsoraConfig, QosoraConfig
from qosora.decompose.factorize import factorize
from qosora.errors import CheckpointError, ConfigError, QosoraError
from qosora.export import export_lora, export_merged
from qosora.layers import vocabulary
from qosora.layers.vocabulary import (
    DecomposedMatrix,
    EightBitMatrix,
    QosoraEmbedding,
    QosoraHead,
    VocabularyMatrix,
    panel_of,
)

CONFIG: dict[str, Any] = {"rank": 8, "blocksize": 32, "embeddings": "4bit"}
KINDS = ("8bit", "4bit")
#: Untied, tied, tied with embeddings that are multiplied, untied with a bias in the head.
FAMILIES = ("llama", "qwen3", "gemma3", "phi")
TOKENS, HIDDEN = 96, 64


def matrix(*, has_scale: bool = True, double_quant: bool = True) -> DecomposedMatrix:
    made = DecomposedMatrix(
        HIDDEN, TOKENS, bias=False, rank=8, blocksize=32, has_scale=has_scale, double_quant=double_quant
    )
    made.set_factors(factorize(torch.randn(TOKENS, HIDDEN), 8, blocksize=32, double_quant=double_quant))
    with torch.no_grad():
        made.o.uniform_(0.5, 2)
        if made.c is not None:
            made.c.uniform_(0.5, 2)
    return made


def eight_bits() -> EightBitMatrix:
    made = EightBitMatrix(HIDDEN, TOKENS)
    made.load_state_dict(made.state_of(torch.randn(TOKENS, HIDDEN), "x"))
    return made


def made(kind: str) -> VocabularyMatrix:
    return matrix() if kind == "4bit" else eight_bits()


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "PANEL", 40)
    monkeypatch.setattr(vocabulary, "MERGED", 7)


def checkpoint(folder: Path, family: str, **config: Any) -> Path:
    if family != "phi":
        return make_checkpoint(folder, family, **config)
    from transformers import PhiConfig

    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**sizes, num_attention_heads=4, initializer_range=0.2))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_are_those_of_the_whole_matrix(double_quant: bool, has_scale: bool):
    stored = matrix(has_scale=has_scale, double_quant=double_quant)
    whole = stored.dequantize()
    ids = torch.tensor([5, 0, 95, 5, 17, 64, 33, 2, 2])
    for index in (ids, slice(None), slice(3, 50), slice(90, 96)):
        torch.testing.assert_close(stored.rows(index, torch.float32), whole[index], rtol=1e-5, atol=1e-6)
        for dtype in (torch.bfloat16, torch.float16):
            got = stored.rows(index, dtype)
            assert got.dtype == dtype
            torch.testing.assert_close(got, stored.rows(index, torch.float32).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [-1, TOKENS, -100])
def test_ids_of_no_token_are_refused(token: int, kind: str):
    embedding, _ = pair(kind)
    ids = torch.tensor([[3, token]])
    for module in (nn.Embedding(TOKENS, HIDDEN), embedding):
        with pytest.raises(IndexError):
            module(ids)
    assert torch.equal(embedding(torch.tensor([3], dtype=torch.int32)), embedding(torch.tensor([3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_in_eight_bits(dtype: torch.dtype):
    weight = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    weight[3] = 0
    stored = EightBitMatrix(HIDDEN, TOKENS)
    stored.load_state_dict(stored.state_of(weight, "x"))
    whole = stored.whole(torch.float32)
    assert not whole[3].any()
    assert ((whole - weight.float()).abs() <= weight.float().abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    ids = torch.tensor([5, 0, 95, 5, 17])
    for index in (ids, slice(None), slice(3, 50)):
        got = stored.rows(index, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, whole[index].to(dtype))
    again = stored.state_of(whole, "x")  # exact: nothing is lost twice
    assert torch.equal(again["weight"], stored.weight)


def test_what_is_not_finite_is_refused_by_name():
    weight = torch.randn(TOKENS, HIDDEN)
    weight[3, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight: 1 of 6144 values are NaN or infinite"):
        eight_bits().state_of(weight, "model.embed_tokens.weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3,), (2, 30), (70,)], ids=str)
def test_logits_and_their_gradient(shape: tuple[int, ...], kind: str):
    stored = made(kind)
    x = torch.randn(*shape, HIDDEN, requires_grad=True)
    y = stored.logits(x)
    g = torch.randn_like(y)
    y.backward(g)
    whole = stored.whole(torch.float32).double()
    torch.testing.assert_close(y.double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), g.double() @ whole, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(stored.logits(x), y.detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_decides_about_the_dtype(kind: str):
    stored, x = made(kind), torch.randn(20, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert stored.logits(x).dtype == torch.bfloat16
        assert stored.logits(x.detach()[:2]).dtype == torch.bfloat16


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[QosoraEmbedding, QosoraHead]:
    embedding = QosoraEmbedding.of(nn.Embedding(TOKENS, HIDDEN, dtype=dtype), made(kind))
    return embedding, QosoraHead(nn.Linear(HIDDEN, TOKENS, bias=False, dtype=dtype), None, embedding)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_stands_for_the_matrix(kind: str):
    embedding, head = pair(kind, torch.bfloat16)
    whole = embedding.matrix.rows(slice(None), torch.bfloat16)
    for layer in (embedding, head):
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        assert (weight.shape, weight.dtype, len(weight)) == (whole.shape, torch.bfloat16, TOKENS)
        assert not weight.requires_grad
        assert weight.untyped_storage().nbytes() <= whole.nbytes
        assert torch.equal(weight[3:9], whole[3:9])
        assert torch.equal(F.embedding(torch.tensor([1, 2]), weight), whole[1:3])
        assert torch.equal(weight.float(), whole.float())
        with pytest.raises(QosoraError, match="cannot be changed or resized"):
            weight.data = whole
    assert not list(head.parameters())  # stored once
    twin = copy.deepcopy(nn.ModuleList([embedding, head]))
    assert twin[1].matrix is twin[0].matrix
    twin.to(torch.float32)
    assert twin[0].weight.dtype == twin[1].weight.dtype == torch.float32
    assert {p.dtype for p in twin[0].parameters() if p.is_floating_point()} == {torch.float32}
    twin.to(torch.bfloat16)
    assert torch.equal(twin[1].weight[:], whole)  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_that_never_builds_all_logits(tmp_path: Path, kind: str):
    model = decompose(make_checkpoint(tmp_path, "qwen3"), QosoraConfig(**{**CONFIG, "embeddings": kind}))
    plain = copy.deepcopy(model)
    plain.dequantize()
    grads = []
    for each in (model, plain):
        add_fused_lm_head(each)
        hidden = each.get_input_embeddings()(token_ids()).detach().requires_grad_()
        with loss_chunks(panel_of(each)):
            out = each(inputs_embeds=hidden, labels=token_ids(), fused_lm_head=True)
        (grad,) = torch.autograd.grad(out.log_probs.sum(), hidden)
        grads.append((out.log_probs.detach(), grad))
    assert panel_of(model) == 40
    assert panel_of(plain) is None
    # The decoder layers of the second are dequantized in another order of sums.
    for got, expected in zip(*grads, strict=True):
        assert relative_difference(got, expected) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_the_same_however_it_is_made(family: str, kind: str, tmp_path: Path):
    source, config = checkpoint(tmp_path / "source", family), QosoraConfig(**{**CONFIG, "embeddings": kind})
    quantize(source, tmp_path / "streamed", config)
    model = decompose(source, config)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "streamed"))
    for name in ("saved", "streamed"):
        loaded = load(tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))
        assert isinstance(loaded.get_input_embeddings(), QosoraEmbedding)
        assert isinstance(loaded.get_output_embeddings(), QosoraHead)
        found = describe(tmp_path / name)
        ends = 0 if kind == "8bit" else 1 if model.config.tie_word_embeddings else 2
        assert found["decomposed_layers"] - found["adapted_layers"] == ends
        assert found["adapter_parameters"] == sum(
            p.numel() for p in get_peft_model(loaded, OsoraConfig()).parameters() if p.requires_grad
        )
        assert not verify(tmp_path / name)["problems"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_exports(family: str, kind: str, dtype: torch.dtype, tmp_path: Path):
    source = checkpoint(tmp_path / "source", family)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    quantize(source, base, QosoraConfig(**{**CONFIG, "embeddings": kind}), dtype=dtype)
    perturbed(load(base)).save_pretrained(adapter)
    export_merged(base, tmp_path / "merged", adapter, verify=True)
    export_merged(base, tmp_path / "onto", adapter, onto="original", original=source, verify=True)
    export_lora(base, tmp_path / "lora", adapter, original=source, verify=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    whole = load(base).get_input_embeddings().matrix.whole(torch.float32)
    assert torch.equal(merged.get_input_embeddings().weight, whole.to(dtype))
    if dtype == torch.float32:
        model = load_base(base)
        before = logits(model)
        assert relative_difference(logits(model.dequantize()), before) < rounding(dtype)
        assert type(model.get_input_embeddings()) is type(merged.get_input_embeddings())
        model.save_pretrained(tmp_path / "plain")
        assert tensors_of(tmp_path / "plain").keys() == tensors_of(tmp_path / "merged").keys()


def test_an_output_layer_of_its_own_in_spite_of_the_config(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "qwen3")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "streamed", QosoraConfig(**CONFIG))
    model = decompose(source, QosoraConfig(**CONFIG))
    model.save_pretrained(tmp_path / "saved")
    for each in (model, load(tmp_path / "streamed"), load(tmp_path / "saved")):
        ends = each.get_input_embeddings(), each.get_output_embeddings()
        assert ends[0].matrix is not ends[1].matrix
        assert torch.equal(logits(each), logits(model))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # a copy, as some checkpoints have
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "tied", QosoraConfig(**CONFIG))
    tied = decompose(source, QosoraConfig(**CONFIG))
    assert tied.get_input_embeddings().matrix is tied.get_output_embeddings().matrix
    assert torch.equal(logits(load(tmp_path / "tied")), logits(tied))


def test_ranks_and_what_is_left(tmp_path: Path):
    source = make_checkpoint(tmp_path, "llama")
    model = decompose(source, QosoraConfig(**CONFIG, rank_pattern={"embed_tokens": 3, "lm_head": 5}))
    assert model.get_input_embeddings().matrix.rank == 3
    assert model.get_output_embeddings().matrix.rank == 5
    for left, kinds in (("lm_head", (QosoraEmbedding, nn.Linear)), ("embed_tokens", (nn.Embedding, QosoraHead))):
        model = decompose(source, QosoraConfig(**CONFIG, modules_to_not_convert=[left]))
        assert (type(model.get_input_embeddings()), type(model.get_output_embeddings())) == kinds
    tied = decompose(
        make_checkpoint(tmp_path / "tied", "qwen3"), QosoraConfig(**CONFIG, modules_to_not_convert=["lm_head"])
    )
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_what_cannot_be(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(ConfigError, match="multiple of blocksize, got 32 and 64"):
        decompose(source, QosoraConfig(rank=8, embeddings="4bit"))
    with pytest.raises(ConfigError, match="embeddings must be one of None, 8bit, 4bit"):
        QosoraConfig(embeddings="nf4")
    shared = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=56, num_layers=1, num_heads=2, d_kv=16)
    )
    shared.save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has no input embeddings of its own"):
        quantize(tmp_path / "t5", tmp_path / "base", QosoraConfig(**CONFIG))
    model = decompose(source, QosoraConfig(**CONFIG))
    with pytest.raises(ConfigError, match="embed_tokens is quantized and cannot be trained in full"):
        get_peft_model(model, OsoraConfig(modules_to_save=["embed_tokens"]))
    with pytest.raises(ConfigError, match="matches 1 modules that are not decomposed, among them lm_head"):
        get_peft_model(model, OsoraConfig(target_modules=["lm_head"]))
    with pytest.raises(QosoraError, match="cannot be changed or resized"):
        model.resize_token_embeddings(TOKENS + 3)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_as_before(tmp_path: Path, kind: str):
    base = make_base(tmp_path / "base", "gemma3", QosoraConfig(**{**CONFIG, "embeddings": kind}))
    model, plain = load(base), load(base)
    vocabulary.plain_vocabulary(plain, torch.float32)
    ids = token_ids(1, 5)
    first, second = (each.generate(ids, max_new_tokens=6, do_sample=False) for each in (model, plain))
    assert torch.equal(first, second)
    assert plain.state_dict().keys() & {"model.embed_tokens.weight", "lm_head.weight"}
