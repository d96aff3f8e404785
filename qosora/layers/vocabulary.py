"""Input embeddings and output layer, quantized: rows are decoded where they are used, and never all of them at once.

    embedding   rows of the tokens; in 4 bits (R_i + (o_i U_i ⊙ s) Vᵀ) ⊙ c for each token i
    head        logits a panel of the vocabulary at a time; their gradient for the hidden states likewise

The matrix (tokens, hidden_size) is frozen. In 4 bits it is decomposed like any other (`qosora.layers.linear`), in 8 it
is as `decompose.int8` has it; a model that ties the two layers stores it once. Both layers keep an attribute `weight`
for whoever asks for its shape, dtype or device, or for some rows, as losses that never build all logits do: a slice of
it is decoded. Any other operation gets the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qosora.compat.torch import tree_map
from qosora.compat.transformers import remember_ties
from qosora.decompose import Factors, int8, nf4
from qosora.errors import QosoraError
from qosora.layers import ops
from qosora.layers.device import autocast_dtype
from qosora.layers.kept import KEPT_ROWS
from qosora.layers.linear import QosoraLinear, float32_kept

__all__ = [
    "STORE",
    "DecomposedMatrix",
    "EightBitMatrix",
    "QosoraEmbedding",
    "QosoraHead",
    "VocabularyMatrix",
    "embedding_name",
    "layers_on_disk",
    "panel_of",
    "plain_vocabulary",
    "quantized_modules",
]

#: Attribute of both layers: the module that holds what is stored.
STORE = "stored"
#: Rows that are decoded at a time for logits and their gradient.
PANEL = 8192  # TRL's own are of 32768 tokens, which in 16 bits are 256 MiB of an 8B's head
#: Rows that are merged in float32 at a time: a quarter of a panel, which then takes no more than twice its own memory.
MERGED = 2048


def embedding_name(model: PreTrainedModel) -> str | None:
    """Return the name of the module with a model's embeddings of tokens; None of one that has no table of them."""
    try:
        wanted = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)


class VocabularyMatrix(nn.Module):
    """The matrix of embeddings or output layer, (tokens, hidden_size): `out_features`, `in_features`."""

    out_features: int
    in_features: int

    def rows(self, index: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows, (rows, hidden_size), computed in float32 and rounded once.

        Args:
            index: A slice without a step, or int64 numbers, (rows,).
            dtype: float32, float16 or bfloat16.
        """
        raise NotImplementedError

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix."""
        return self.rows(slice(None), dtype)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed matrix, (..., tokens), differentiable in x: (..., hidden_size)."""
        dtype = autocast_dtype(x) or x.dtype
        y: torch.Tensor = _Logits.apply(x.reshape(-1, self.in_features).to(dtype), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    def panels(self) -> list[slice]:
        """Return the slices of rows that are decoded at a time."""
        count = self.out_features
        return [slice(start, min(start + PANEL, count)) for start in range(0, count, PANEL)]


class DecomposedMatrix(QosoraLinear, VocabularyMatrix):
    """One that is decomposed, in 4 bits."""

    #: Options of `factorize` that are its own: with columns brought to one norm the logits came out further off.
    factorize_options: ClassVar[dict[str, Any]] = {"scale": None}

    def state_of(self, factors: Factors) -> dict[str, torch.Tensor]:
        """Return the parameters that hold a decomposition, by name; c is there as in any layer of the base, as ones."""
        state = super().state_of(factors)
        return state if self.c is None else {**state, "c": torch.ones(self.in_features, device=factors.sigma.device)}

    @torch.no_grad()
    def rows(self, index: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows; see `VocabularyMatrix`."""
        factors = self.factors
        V = ops.dequantize(factors.V, torch.float32)
        if dtype == torch.float32:
            return self._merged(factors, V, index)
        if isinstance(index, slice):
            index = torch.arange(self.out_features, device=V.device)[index]
        matrix = V.new_empty(len(index), self.in_features, dtype=dtype)
        for rows, numbers in zip(torch.split(matrix, MERGED), torch.split(index, MERGED), strict=True):
            rows.copy_(self._merged(factors, V, numbers))
        return matrix

    def _merged(self, factors: Factors, V: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
        matrix = nf4.rows(factors.residual, index)  # first: it refuses numbers of no row
        matrix.addmm_(nf4.columns(factors.U, index).mul_(self.s[:, None]).mul_(self.o[index]).T, V)
        return matrix if self.c is None else matrix.mul_(self.c)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed matrix; of few rows, as where a model generates, as any layer of the base."""
        graph = torch.is_grad_enabled() and x.requires_grad
        if not graph and x.numel() <= KEPT_ROWS * self.in_features:
            return self(x)
        return super().logits(x)


class EightBitMatrix(VocabularyMatrix):
    """One in 8 bits, with a scale for each token.

    Args:
        in_features: Hidden size.
        out_features: Tokens.
        device: Where to allocate the parameters, which are uninitialised.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = torch.empty(out_features, dtype=torch.float32, device=device)
        self.register_parameter(int8.SCALE, nn.Parameter(scales, requires_grad=False))

    def state_of(self, weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        """Return the parameters that hold a matrix, by name.

        Raises:
            CheckpointError: If it is not finite.
        """
        return dict(zip(("weight", int8.SCALE), int8.quantize(weight, name), strict=True))

    @torch.no_grad()
    def rows(self, index: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows; see `VocabularyMatrix`."""
        codes, scales = self.weight, self.get_parameter(int8.SCALE)
        if isinstance(index, slice):
            return int8.dequantize(codes[index], scales[index], dtype)
        # Numbers of no row are refused, negative ones, too.
        return int8.dequantize(codes.index_select(0, index), scales.index_select(0, index), dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> EightBitMatrix:
        """Move or cast, but keep float32 scales float32."""
        with float32_kept(self, [int8.SCALE]):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Logits(torch.autograd.Function):
    """x Wᵀ, W decoded a panel at a time, forward and backward; x is not saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: VocabularyMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        y = x.new_empty(len(x), matrix.out_features)
        for panel in matrix.panels():
            y[:, panel] = x @ matrix.rows(panel, x.dtype).T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        matrix: VocabularyMatrix = ctx.matrix
        dx = g.new_zeros(len(g), matrix.in_features, dtype=torch.float32)  # a sum of many panels
        for panel in matrix.panels():
            dx += g[:, panel] @ matrix.rows(panel, g.dtype)
        return dx.to(g.dtype), None


class _Weight(torch.Tensor):
    """Stands for the matrix, in shape, dtype and device: a slice of it is decoded, and for anything else the whole."""

    matrix: VocabularyMatrix

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _of_metadata():
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise QosoraError(
                "quantized embeddings cannot be changed or resized: make the base without `embeddings`, or of a model "
                "that has the tokens already"
            )
        if func in (torch.Tensor.detach, torch.Tensor.requires_grad_):
            return args[0]
        if func is torch.Tensor.__getitem__ and isinstance(args[1], slice):
            return args[0].matrix.rows(args[1], args[0].dtype)
        return func(*tree_map(_decoded, args), **tree_map(_decoded, kwargs or {}))


@cache
def _of_metadata() -> frozenset[Any]:
    attributes = ("shape", "dtype", "device", "is_meta", "is_cpu", "is_cuda", "ndim", "layout", "requires_grad", "grad",
                  "is_leaf", "is_quantized", "is_sparse")  # fmt: skip
    methods = ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "__len__", "__hash__")
    getters = [getattr(torch.Tensor, name).__get__ for name in attributes]
    return frozenset([*getters, *(getattr(torch.Tensor, name) for name in methods)])


def _decoded(value: Any) -> Any:
    return value.matrix.whole(value.dtype) if isinstance(value, _Weight) else value


class _OfVocabulary(nn.Module):
    """What embedding and head have in common."""

    #: Of the model's dtype, (1,): the layer has no other tensor that a change of the model's dtype reaches.
    like: torch.Tensor

    @property
    def matrix(self) -> VocabularyMatrix:
        """What is stored."""
        raise NotImplementedError

    @property
    def weight(self) -> nn.Parameter:
        """What stands for the matrix; see `_Weight`."""
        shape = (self.matrix.out_features, self.matrix.in_features)
        stand_in = self.like.expand(shape).as_subclass(_Weight)
        stand_in.matrix = self.matrix
        return nn.Parameter(stand_in, requires_grad=False)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None) -> nn.Parameter:
        """Return the matrix, (tokens, hidden_size), in a dtype; float32 by default."""
        return nn.Parameter(self.matrix.whole(dtype or torch.float32))


class QosoraEmbedding(_OfVocabulary, nn.Embedding):  # type: ignore[misc]
    """An embedding that decodes the rows of the tokens it gets. Made in place of a model's own by `of`."""

    @staticmethod
    def of(module: nn.Embedding, matrix: VocabularyMatrix) -> QosoraEmbedding:
        """Make a module's weight a decomposed one, in place.

        A class of its own stays what it is, as where it multiplies the embeddings: in it, `nn.Embedding.forward` is
        replaced.
        """
        like = module.weight.new_empty(1)
        del module.weight
        module.__class__ = _with_own_forward(type(module))  # type: ignore[arg-type]
        module.register_module(STORE, matrix)
        module.register_buffer("like", like, persistent=False)
        assert isinstance(module, QosoraEmbedding)
        return module

    def undo(self, dtype: torch.dtype | None) -> None:
        """Make it again what `of` made it of, with the dequantized matrix as its weight."""
        weight = self.dequantize(dtype)
        delattr(self, STORE)
        del self.like
        self.__class__ = nn.Embedding if type(self) is QosoraEmbedding else type(self).__bases__[0]
        self.weight = weight  # type: ignore[misc]

    @property
    def matrix(self) -> VocabularyMatrix:
        """What is stored."""
        return self.get_submodule(STORE)  # type: ignore[return-value]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the tokens' embeddings, (..., hidden_size), of ids (...); others are refused as by any embedding."""
        matrix = self.matrix
        rows = matrix.rows(input.reshape(-1).long(), self.like.dtype)
        return rows.view(*input.shape, matrix.in_features).data  # no view, which FSDP2 warns of


@cache
def _with_own_forward(kind: type[nn.Embedding]) -> type[QosoraEmbedding]:
    """Return a class that is `kind`, with `QosoraEmbedding` below it in place of `nn.Embedding`."""
    if kind is nn.Embedding:
        return QosoraEmbedding
    return type(kind.__name__, (kind, QosoraEmbedding), {})


class QosoraHead(_OfVocabulary, nn.Linear):  # type: ignore[misc]
    """An output layer that decodes the matrix a panel at a time.

    Args:
        head: The layer in whose place it is.
        matrix: Its own; None with a tied one.
        embedding: Whose matrix is tied.
    """

    def __init__(
        self, head: nn.Linear, matrix: VocabularyMatrix | None, embedding: QosoraEmbedding | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.bias = head.bias
        self.register_module(STORE, matrix)
        self._embedding = [embedding]  # a list, for its tensors to be stored once
        self.register_buffer("like", head.weight.new_empty(1), persistent=False)

    @property
    def matrix(self) -> VocabularyMatrix:
        """What is stored."""
        embedding = self._embedding[0]
        return getattr(self, STORE) if embedding is None else embedding.matrix

    def plain(self, dtype: torch.dtype | None) -> nn.Linear:
        """Return the layer that it is in the place of; a tied one once the embedding is plain again."""
        with torch.device("meta"):
            new = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        embedding = self._embedding[0]
        new.weight = self.dequantize(dtype) if embedding is None else embedding.weight
        new.bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(new.weight.dtype))
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, (..., tokens). x: (..., hidden_size)."""
        y = self.matrix.logits(x)
        return y if self.bias is None else y.add_(self.bias)


def quantized_modules(model: nn.Module) -> dict[str, QosoraLinear | EightBitMatrix]:
    """Return what a model has in place of weights in 16 bits, by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (QosoraLinear, EightBitMatrix))}


def layers_on_disk(model: nn.Module) -> dict[str, QosoraLinear | EightBitMatrix]:
    """Return the same by the names they have on disk: a matrix, that of its embedding."""
    found = quantized_modules(model)
    return {n.removesuffix(f".{STORE}") if isinstance(m, VocabularyMatrix) else n: m for n, m in found.items()}


def plain_vocabulary(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Replace quantized embeddings and output layer by plain ones, dequantized, in place."""
    ends = [(name, module) for name, module in model.named_modules() if isinstance(module, _OfVocabulary)]
    for _, module in ends:
        if isinstance(module, QosoraEmbedding):
            module.undo(dtype)
    for name, module in ends:
        if isinstance(module, QosoraHead):
            model.set_submodule(name, module.plain(dtype))
    if ends:
        remember_ties(model)


def panel_of(model: nn.Module) -> int | None:
    """Return how many rows of a model's head a loss should ask for at a time; None where it is not quantized."""
    return PANEL if any(isinstance(module, QosoraHead) for module in model.modules()) else None
