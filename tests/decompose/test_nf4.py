from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import reference
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default import ops as compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import with_threads
from torch import Tensor

from qosora.decompose import nf4
from qosora.decompose.nf4 import (
    BLOCKSIZES,
    QUANT_TYPES,
    FourBitTensor,
    dequantize,
    quantize,
    squared_error,
    stored_shapes,
)

U32 = 2.0**-24  # unit roundoff of float32
#: bitsandbytes' CPU kernel looks the nearest 8-bit entry up in a table of 2^16 cells over [-1, 1]: in the cell of a
#: midpoint it may take the other neighbour, which is then farther by at most twice the cell's width of 2^-15.
LOOKUP = 2.0**-14
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, times a scale of their own for every row, so that absmax values differ."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def check_absmax(q: FourBitTensor, expected: np.ndarray) -> None:
    """The stored absmax values are the nearest that the format holds."""
    if q.absmax_scale is None:
        assert np.array_equal(reference.array(q.absmax), expected)
        return
    assert q.absmax_offset is not None
    offset, scale = float(q.absmax_offset), reference.array(q.absmax_scale)
    # A float32 mean of `blocks` positive values: blocks - 1 additions and a division.
    assert abs(offset - expected.mean()) <= len(expected) * U32 * expected.mean()
    code = reference.dynamic_map()
    for i, value in enumerate(expected):
        block = i // reference.ABSMAX_BLOCK
        centred = np.float32(expected[i]) - np.float32(offset)
        largest = max(
            abs(float(np.float32(v) - np.float32(offset)))
            for v in expected[block * reference.ABSMAX_BLOCK : (block + 1) * reference.ABSMAX_BLOCK]
        )
        assert scale[block] == pytest.approx(largest, rel=2 * U32), i
        if largest:  # else every code means 0
            scaled = float(centred) / largest
            got, best = abs(scaled - code[int(q.absmax[i])]), abs(scaled - code[reference.nearest(code, scaled)])
            assert got <= best + LOOKUP, (i, value)


def check_quantized(x: Tensor, q: FourBitTensor) -> None:
    """Every index is a nearest one, every absmax the block's largest value."""
    values, table = reference.array(x).flatten(), np.array(reference.TABLES[q.quant_type])
    expected = reference.quantize(values, table, q.blocksize)
    check_absmax(q, expected.absmax)
    largest = np.repeat(expected.absmax, q.blocksize)[: len(values)]
    scaled = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    got, best = (np.abs(scaled - table[indices]) for indices in (reference.indices(q), expected.indices))
    assert (got <= best + 4 * U32).all()


def check_dequantized(q: FourBitTensor) -> None:
    """Within three float32 roundings of the reference (absmax: product, sum; value: product), then one of the dtype."""
    value, magnitude = reference.dequantize(q)
    for dtype in DTYPES:
        got = dequantize(q, dtype)
        assert got.dtype == dtype
        assert got.shape == q.shape
        u = torch.finfo(dtype).eps / 2
        smallest = torch.finfo(dtype).tiny * 2 * u  # spacing of subnormal numbers
        assert (np.abs(reference.array(got) - value) <= (4 * U32 + u) * magnitude + smallest).all()


@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(QUANT_TYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_any_shape_against_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, quant_type: str, blocksize: int, double_quant: bool, seed: int
):
    numel = math.prod(shape)
    if numel > 2000:
        shape = (*shape[:-2], shape[-1])
    x = random(shape, seed, dtype)
    q = quantize(x, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    assert (q.shape, q.quant_type, q.blocksize) == (shape, quant_type, blocksize)
    assert {k: (tuple(t.shape), t.dtype) for k, t in q.tensors().items()} == stored_shapes(
        x.numel(), blocksize, double_quant
    )
    check_quantized(x, q)
    check_dequantized(q)


@pytest.mark.parametrize("shape", [(3, 16), (7, 48), (8, 96), (3, 320)])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_end_inside_a_block(shape: tuple[int, int], blocksize: int, dtype: torch.dtype, seed: int):
    q = quantize(random(shape, seed, dtype), blocksize=blocksize, double_quant=False)
    check_dequantized(q)


def test_more_absmax_values_than_one_block_holds(seed: int):
    x = random((300, 64), seed)  # 300 blocks: 256 and 44
    q = quantize(x)
    assert q.absmax_scale is not None
    assert q.absmax_scale.shape == (2,)
    check_quantized(x, q)
    check_dequantized(q)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 128), (30, 50), (3, 2048)])
def test_equal_to_bitsandbytes_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool, blocksize: int, quant_type: str, seed: int
):
    x = random(shape, seed, dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant)
    q = quantize(x, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    assert torch.equal(q.packed, packed.flatten())
    assert torch.equal(q.absmax, state.absmax)
    if double_quant:
        assert q.absmax_scale is not None
        assert q.absmax_offset is not None
        assert torch.equal(q.absmax_scale, state.state2.absmax)
        assert torch.equal(q.absmax_offset, state.offset)
    if shape[-1] % blocksize == 0:  # else bitsandbytes' CPU kernel takes wrong absmax values: see `dequantize`
        assert torch.equal(dequantize(q, dtype), bnb.dequantize_4bit(packed, state))


def check_bytes(x: Tensor, quant_type: str, blocksize: int) -> None:
    """The same as bitsandbytes' operator, which need not be divided into whole blocks or bytes."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(x.contiguous(), blocksize, quant_type, torch.uint8)
    q = quantize(x, quant_type=quant_type, blocksize=blocksize, double_quant=False)
    assert torch.equal(q.packed, packed.flatten())
    assert torch.equal(q.absmax.view(torch.int32), absmax.view(torch.int32))


#: Up to where float32 ends, and where the reciprocal of a block's largest value does.
SCALES = (1.0, 1e-45, 3e-39, 9e-39, 1e-38, 1.2e-38, 1e-30, 1e30, 8e37, 1e38, 3.4e38)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_ties_zeros_and_extremes_equal_bitsandbytes(quant_type: str, dtype: torch.dtype, blocksize: int, seed: int):
    """Values at a midpoint of two codes and next to it; zeros of both signs; blocks of zeros; a block cut short."""
    table = torch.tensor(reference.TABLES[quant_type]).sort().values
    middle = (table[:-1] + table[1:]) / 2
    above, below = (torch.nextafter(middle, torch.tensor(end)) for end in (9.0, -9.0))
    ends = torch.tensor([1.0, -1.0, 0.0, -0.0, 1 - U32, 2 * U32])
    near = torch.cat([middle, above, below, table, ends]).repeat(-(-3 * blocksize // 67))[: 3 * blocksize]
    near = torch.cat([near, torch.zeros(blocksize), near[: blocksize + 13] * 0.7])
    noise = torch.randn(3 * blocksize, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4) / 4
    for scale in SCALES:
        x = (torch.cat([noise, near]) * scale).to(dtype)
        x = torch.where(x.isfinite(), x, 0)
        check_bytes(x, quant_type, blocksize)
        check_bytes(x[:-1], quant_type, blocksize)


@given(
    shape=SHAPES,
    quant_type=st.sampled_from(QUANT_TYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    order=st.sampled_from(["contiguous", "transposed", "padded"]),
    panel=st.sampled_from([1, 64, 500, 2**17]),
    seed=st.integers(0, 2**32),
)
def test_panels_equal_the_whole(
    shape: tuple[int, ...], quant_type: str, blocksize: int, order: str, panel: int, seed: int
):
    x = random(shape, seed)
    if order == "transposed":
        x = x.transpose(0, -1)
    elif order == "padded":
        x = torch.nn.functional.pad(x, (0, 3))[..., :-3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "PANEL", panel)
        check_bytes(x, quant_type, blocksize)
        q = quantize(x, quant_type=quant_type, blocksize=blocksize)
        error = float((x.double() - dequantize(q)).square().sum())
        assert squared_error(x, q) == pytest.approx(error, rel=1e-6, abs=1e-300)


def test_squared_error_of_any_scale(seed: int):
    for scale in (1e-30, 1e-12, 1.0, 1e12, 1e30):
        x = random((30, 50), seed) * scale
        q = quantize(x, double_quant=False)
        error = float((x.double() - dequantize(q)).square().sum())
        assert squared_error(x, q) == pytest.approx(error, rel=1e-6)
    assert squared_error(torch.zeros(3, 64), quantize(torch.zeros(3, 64))) == 0


def test_the_same_bits_on_any_number_of_threads(seed: int):
    x = random((900, 4096), seed)  # 57,600 blocks: torch's mean of their absmax values depends on the threads
    one, two, three = (with_threads(n, lambda: quantize(x)) for n in (1, 2, 3))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name]), name
        assert torch.equal(tensor, three.tensors()[name]), name
    assert len({with_threads(n, lambda: squared_error(x, one)) for n in (1, 2, 3)}) == 1
    _, state = with_threads(1, lambda: bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True))
    assert one.absmax_offset is not None
    assert torch.equal(one.absmax_offset, state.offset)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_tables(quant_type: str):
    """The library decodes the 16 codes, and the 256 codes of absmax, to the published tables."""
    codes = torch.arange(0, 16, dtype=torch.uint8)
    q = FourBitTensor((codes[::2] << 4) | codes[1::2], torch.ones(1), None, None, (16,), quant_type, 64)
    assert dequantize(q).tolist() == list(reference.TABLES[quant_type])
    assert np.abs(reference.array(bnb.create_dynamic_map()) - reference.dynamic_map()).max() <= 2 * U32


def test_nf4_is_made_of_normal_quantiles():
    """QLoRA, equation 4, as released: 8 positive and 7 negative quantiles and 0, scaled to [-1, 1]."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    table = np.array(sorted([*positive, *negative, 0.0])) / max(positive)
    assert np.abs(table - np.array(reference.NF4)).max() < 2e-7  # it was computed from float32 probabilities


@pytest.mark.parametrize("shape", [(7,), (16,), (5, 7), (3, 5, 7), (8, 9), (9, 8), (1, 1)])
def test_nothing_is_compiled(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise AssertionError("bitsandbytes fell back to torch.compile, which takes seconds")

    monkeypatch.setattr(compiled, "_dequantize_4bit_compute", refuse)
    monkeypatch.setattr(compiled, "_dequantize_blockwise_compute", refuse)
    torch._dynamo.utils.counters.clear()
    x = torch.randn(shape)
    q = quantize(x)
    for dtype in DTYPES:
        assert dequantize(q, dtype).shape == shape
    if len(shape) == 2:
        nf4.matmul(torch.randn(3, shape[1]), q)
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_zero_and_constant(quant_type: str, double_quant: bool):
    for value in (0.0, 0.37, -2.0):
        x = torch.full((5, 77), value)
        q = quantize(x, quant_type=quant_type, double_quant=double_quant)
        # ±1 is in both tables and the absmax values are equal: only the float32 mean and its sum round.
        assert (dequantize(q) - x).abs().max() <= 8 * U32 * abs(value)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_block_of_zeros_among_others(double_quant: bool):
    x = torch.randn(8, 64)
    x[3] = 0
    assert not dequantize(quantize(x, double_quant=double_quant))[3].any()


def test_a_transposed_tensor_is_read_in_its_own_order():
    x = torch.randn(33, 70)
    assert torch.equal(dequantize(quantize(x.T)), dequantize(quantize(x.T.contiguous())))


def test_bytes():
    n = 4096 * 4096
    shapes = stored_shapes(n, 64, True)
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    assert total == n // 2 + n // 64 + 4 * (n // 64 // 256) + 4
    assert 8 * total / n == pytest.approx(4.127, abs=5e-4)
    x = torch.randn(30, 50)
    assert quantize(x).nbytes == 750 + 24 + 4 + 4
    assert quantize(x, double_quant=False).nbytes == 750 + 24 * 4
    assert quantize(torch.randn(5, 7)).nbytes == 18 + 1 + 4 + 4  # an odd value takes a byte


def test_to_moves_every_tensor():
    for double_quant in (True, False):
        q = quantize(torch.randn(30, 50), double_quant=double_quant)
        moved = q.to("meta")
        assert moved.tensors().keys() == q.tensors().keys()
        assert all(t.is_meta for t in moved.tensors().values())
        assert (moved.shape, moved.blocksize, moved.quant_type, moved.nbytes) == (q.shape, 64, "nf4", q.nbytes)


@given(
    rows=st.integers(0, 5),
    m=st.integers(1, 60),
    n=st.one_of(st.integers(1, 130), st.sampled_from([64, 128, 256])),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(QUANT_TYPES),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_matmul(rows: int, m: int, n: int, dtype: torch.dtype, quant_type: str, double_quant: bool, seed: int):
    q = quantize(random((m, n), seed), quant_type=quant_type, double_quant=double_quant)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    W = dequantize(q, dtype)
    y = nf4.matmul(x, q)
    assert y.dtype == dtype
    # The same operands: the order of float32 additions may differ (n u each way), and each result is rounded once.
    bound = 2 * n * U32 * reference.array(x.abs()) @ reference.array(W.abs()).T
    exact = reference.array(x) @ reference.array(W).T
    info = torch.finfo(dtype)
    assert (np.abs(reference.array(y) - exact) <= bound + info.eps * np.maximum(np.abs(exact), info.tiny)).all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_of_zeros_are_zeros(device: str, quant_type: str):
    x = torch.randn(5, 96, device=device)  # ends inside a block
    x[0], x[2, 32:], x[4] = 0, 0, 0
    for double_quant in (True, False):
        q = quantize(x, quant_type=quant_type, blocksize=32, double_quant=double_quant)
        assert (dequantize(q)[x == 0] == 0).all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_code_of_zero_replaces_what_a_kernel_makes_of_nan(quant_type: str):
    """CUDA's kernel gives blocks of zeros the code of -1, which is 0 in NF4."""
    packed, absmax = torch.zeros(40, dtype=torch.uint8), torch.tensor([1.0, 0.0, 0.0])
    nf4._zeros_kept(packed, absmax, quant_type, 32)
    assert not packed[:16].any()
    table = bnb.get_4bit_type(quant_type, device="cpu")
    assert (table[packed[16:].int() >> 4] == 0).all()
    assert (table[packed[16:].int() & 15] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(dtype: torch.dtype, double_quant: bool):
    for shape in ((96, 256), (30, 51), (40, 96)):
        q = quantize(torch.randn(shape).cuda(), double_quant=double_quant)
        check_dequantized(q)
        W = dequantize(q).double()
        for rows in (0, 1, 4, 8, 300):
            x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
            exact, magnitude = x.double() @ W.T, x.double().abs() @ W.abs().T
            # W rounded to the dtype, and one more rounding of the result; a kernel may round partial sums, too.
            assert ((nf4.matmul(x, q).double() - exact).abs() <= 2 * torch.finfo(dtype).eps * magnitude + 1e-6).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(300, 64), (5, 96), (7, 45), (1, 32)])
def test_several_at_once_are_what_each_is(shape: tuple[int, int], double_quant: bool, seed: int):
    """Of fewer and of more blocks than share a scale of absmax values, and of values that fill no block."""
    each = [quantize(random(shape, seed + i), blocksize=32, double_quant=double_quant) for i in range(3)]
    for dtype in DTYPES:
        got = nf4.dequantize_all(each, dtype)
        assert torch.equal(got, torch.stack([dequantize(q, dtype) for q in each]))
        assert got.dtype == dtype


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_rows_and_columns_are_those_of_the_whole(quant_type: str, double_quant: bool, seed: int):
    """Over more blocks than share a scale of absmax values, 256."""
    q = quantize(random((300, 64), seed), quant_type=quant_type, blocksize=32, double_quant=double_quant)
    whole = dequantize(q)
    ids = torch.randint(300, (50,), generator=torch.Generator().manual_seed(seed))
    for index in (ids, slice(None), slice(7, 100), slice(299, 300), ids[:0]):
        for dtype in DTYPES:
            got = nf4.rows(q, index, dtype)
            assert torch.equal(got, dequantize(q, dtype)[index])
            assert got.dtype == dtype
    odd = quantize(random((7, 45), seed), quant_type=quant_type, blocksize=32, double_quant=double_quant)
    for index in (torch.tensor([44, 0, 3, 3]), slice(None), slice(1, 30)):
        assert torch.equal(nf4.columns(odd, index), dequantize(odd)[:, index])
    with pytest.raises(ValueError, match="rows of 45 values are no whole blocks of 32"):
        nf4.rows(odd, slice(None))
    assert whole.shape == (300, 64)
