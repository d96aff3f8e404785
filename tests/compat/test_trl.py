"""What is relied on of TRL beside that names exist; `tests/memory` compares planned bytes with the trainer's."""

from __future__ import annotations

import sys

import pytest
import torch
import trl.kernels.chunked_logprob as loss
import trl.trainer.utils
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.models import activation_offloading as offloading

from qosora.compat import trl as hidden


@pytest.mark.parametrize("triton", [True, False])
def test_the_loss_of_cuda_is_put_in_and_taken_out(monkeypatch: pytest.MonkeyPatch, triton: bool):
    if not triton:
        monkeypatch.delattr(loss, "triton", raising=False)
    before, used = dict(vars(loss)), trl.trainer.utils._use_triton
    with hidden.fused_loss_on_meta():
        assert loss._use_triton(torch.device("meta"))
        assert trl.trainer.utils._use_triton(torch.device("meta"))
        assert loss.triton.cdiv(5, 2) == 3
        assert loss._forward_kernel[(3,)](1, 2, three=3) is None
        assert loss._backward_kernel[(3, 4)](1) is None
    assert dict(vars(loss)) == before
    assert trl.trainer.utils._use_triton is used
    assert hasattr(loss, "triton") == (triton and "triton" in sys.modules)


@pytest.mark.parametrize("name", ["_use_triton", "_forward_kernel", "_backward_kernel", "_addmm_fp32"])
def test_nothing_is_put_where_nothing_was(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.delattr(loss, name)
    before = dict(vars(loss))
    with pytest.raises(Exception, match=name), hidden.fused_loss_on_meta():
        pass
    assert dict(vars(loss)) == before


def test_the_fused_head_gives_log_probabilities_of_chunks():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    ids = torch.arange(6)[None]
    expected = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    hidden.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    found = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
    torch.testing.assert_close(found.flatten()[-5:].sum(), expected.sum())
    assert hidden.TOKEN_CHUNK_SIZE == loss.TOKEN_CHUNK_SIZE > 0


def test_offloading_has_the_limits_that_it_is_made_with(monkeypatch: pytest.MonkeyPatch):
    made: dict[str, int] = {}

    def record(**options: int) -> None:
        made.update(options)
        raise NotImplementedError("made elsewhere")

    monkeypatch.setattr(offloading, "OffloadActivations", record)  # which wants a GPU
    with pytest.raises(NotImplementedError):
        hidden.get_act_offloading_ctx_manager(model=nn.Linear(1, 1))
    assert hidden.offloading_limits() == (made["min_offload_size"], made["max_fwd_stash_size"])
