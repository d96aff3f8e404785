"""Float64 references, written as loops from the definitions. They share no code with qosora or bitsandbytes.

Tensors come in, numpy float64 arrays go out. A stored 4-bit tensor is any object with the attributes of
`qosora.decompose.nf4.FourBitTensor`; only its bytes and its numbers are used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray

#: QLoRA (arXiv 2305.14314), appendix E, as float32 stores them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: A sign bit and eight magnitudes in units of 1/12, in the order of their codes.
FP4 = tuple(sign * float(np.float32(units / 12)) for sign in (1, -1) for units in (0, 1 / 16, 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": NF4, "fp4": FP4}
ABSMAX_BLOCK = 256


def dynamic_map() -> Array:
    """The signed dynamic 8-bit table (Dettmers 2021, arXiv 2110.02861): (256,), ascending.

    For each of seven decades, down from 1, a linear grid with half as many steps as in the decade above: 2^i interval
    midpoints of [0.1, 1] times 10^(i - 6). Together with their negatives, 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        for step in range(2**i):
            middle = 0.1 + 0.9 * (step + 0.5) / 2**i
            values += [middle * 10.0 ** (i - 6), -middle * 10.0 ** (i - 6)]
    return np.array(sorted(values))


def array(tensor: torch.Tensor) -> Array:
    """Any tensor as float64."""
    return tensor.detach().cpu().double().numpy()


def nearest(table: Array, value: float) -> int:
    """Index of the entry of a table that lies nearest to a value."""
    return int(np.argmin(np.abs(table - value)))


class Quantized(NamedTuple):
    """indices: (numel,) int; absmax: (blocks,)."""

    indices: Array
    absmax: Array


def quantize(values: Array, table: Array, blocksize: int) -> Quantized:
    """Blockwise quantization of a flat array: the nearest entry to value / absmax."""
    indices, absmax = [], []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        largest = max(abs(float(v)) for v in block)
        absmax.append(largest)
        indices += [nearest(table, float(v) / largest if largest else 0.0) for v in block]
    return Quantized(np.array(indices), np.array(absmax))


def absmax(q: Any) -> tuple[Array, Array]:
    """The blocks' absmax values, and the sum of the magnitudes that each is computed from."""
    stored = array(q.absmax)
    if q.absmax_scale is None:
        return stored, np.abs(stored)
    code, scale, offset = dynamic_map(), array(q.absmax_scale), float(q.absmax_offset)
    values, magnitudes = np.zeros(len(stored)), np.zeros(len(stored))
    for i, index in enumerate(stored):
        product = code[int(index)] * scale[i // ABSMAX_BLOCK]
        values[i] = product + offset
        magnitudes[i] = abs(product) + abs(offset)
    return values, magnitudes


def indices(q: Any) -> Array:
    """(numel,): the 4-bit indices, the first of a byte in its high half."""
    unpacked = []
    for byte in q.packed.cpu().flatten().tolist():
        unpacked += [byte >> 4, byte & 15]
    return np.array(unpacked[: math.prod(q.shape)])


class Dequantized(NamedTuple):
    """value: the tensor; magnitude: an upper bound of every intermediate result, for error bounds."""

    value: Array
    magnitude: Array


def dequantize(q: Any) -> Dequantized:
    """Decode a stored 4-bit tensor value by value."""
    scales, scale_magnitudes = absmax(q)
    table, codes = TABLES[q.quant_type], indices(q)
    value, magnitude = np.zeros(len(codes)), np.zeros(len(codes))
    for i, code in enumerate(codes):
        value[i] = table[code] * scales[i // q.blocksize]
        magnitude[i] = abs(table[code]) * scale_magnitudes[i // q.blocksize]
    return Dequantized(value.reshape(q.shape), magnitude.reshape(q.shape))


class Layer(NamedTuple):
    """A decomposed linear layer in float64: R (m, n), U (r, m), V (r, n), s (r,), o (m,), bias (m,) or None."""

    R: Array
    U: Array
    V: Array
    s: Array
    o: Array
    bias: Array | None = None

    def weight(self) -> Array:
        """R + diag(o) U diag(s) V, (m, n), summed over the rank."""
        W = self.R.copy()
        for j in range(W.shape[0]):
            for k in range(len(self.s)):
                W[j] += self.o[j] * self.U[k, j] * self.s[k] * self.V[k]
        return W

    def hidden(self, x: Array) -> Array:
        """V x for every row of x: (T, r)."""
        h = np.zeros((len(x), len(self.s)))
        for t in range(len(x)):
            for k in range(len(self.s)):
                h[t, k] = np.sum(self.V[k] * x[t])
        return h

    def output(self, x: Array) -> Array:
        """(T, m) for x (T, n)."""
        h, y = self.hidden(x), np.zeros((len(x), len(self.o)))
        for t in range(len(x)):
            for j in range(len(self.o)):
                y[t, j] = np.sum(self.R[j] * x[t]) + self.o[j] * np.sum(self.U[:, j] * self.s * h[t])
                if self.bias is not None:
                    y[t, j] += self.bias[j]
        return y

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array, Array]:
        """Gradients of sum(g * output(x)) by x, s and o."""
        W, h = self.weight(), self.hidden(x)
        dx, ds, do = np.zeros(x.shape), np.zeros(self.s.shape), np.zeros(self.o.shape)
        for t in range(len(x)):
            for j in range(len(self.o)):
                dx[t] += g[t, j] * W[j]
                ds += g[t, j] * self.o[j] * self.U[:, j] * h[t]
                do[j] += g[t, j] * np.sum(self.U[:, j] * self.s * h[t])
        return dx, ds, do
