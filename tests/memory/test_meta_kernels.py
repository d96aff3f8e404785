"""The meta device computes as another would."""

from __future__ import annotations

import torch

from qosora.memory.meta_kernels import MetaKernels, computing_as
from qosora.memory.tracer import Tracer


def test_meta_kernels_give_what_operations_give():
    kernels = MetaKernels(answer=True)
    a = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    for _ in range(2):  # computed, then remembered
        tracer = Tracer(run=kernels)
        with tracer:
            product, parts = a @ a.T, torch.topk(a.float(), 2)
            view, same = a.T, a.add_(1)
            assert bool((a > 0).all()) is True
            picked = a[torch.ones(3, dtype=torch.bool, device="meta")]
        assert product.shape == (3, 3)
        assert product.dtype == torch.bfloat16
        assert [p.dtype for p in parts] == [torch.float32, torch.int64]
        assert same is a
        assert view.untyped_storage()._cdata == a.untyped_storage()._cdata
        assert picked.shape == (3, 4)


def test_flash_attention_of_the_device_is_taken():
    q = torch.empty(1, 4, 256, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    peaks = {}
    for device in ("cuda", "cpu", "math"):
        tracer = Tracer()
        with computing_as(device) if device != "math" else torch.no_grad(), tracer:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        peaks[device] = tracer.peak()[1].total
    scores = 4 * 256 * 256 * 2
    assert peaks["math"] > scores > peaks["cuda"]
    assert scores > peaks["cpu"]
