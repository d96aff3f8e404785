"""Experts that a module holds in one tensor: one linear layer for each matrix, used by the module's own code.

gpt-oss, Llama 4 and others multiply by `self.gate_up_proj[i]`, a matrix of a parameter (experts, ., .). A matrix is
what is decomposed. So the parameter is taken apart into layers `0.gate_up_proj`, `1.gate_up_proj`, ..., and what the
module's code finds under the parameter's name is a stand-in, whose products are the layers' outputs. Gates, biases,
routing stay as they are. Most have the tensor on disk, too; where the loader makes it of one for each projection of
each expert, as for LongCat, the layers are these, and a matrix is several of them, one below the other.

Which parameters can be taken apart is read off the class's code: those that it uses as `F.linear(x, self.p[i])`, or as
`x @ self.p[i]` and `torch.bmm(x, self.p)`, transposed or cast before it or not, and in no other way. The two differ in
how a matrix is stored. DBRX has the matrices one below the other, and hands them to another module: its are known by
name.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qosora.formats import BASE, BASE_WITH_STACKS

__all__ = [
    "Stack",
    "first_format",
    "hardest",
    "is_taken_apart",
    "layer_of_stack",
    "put_together",
    "stacked_place",
    "take_apart",
    "taken_apart",
]

_SETUP = ("__init__", "_init_weights", "reset_parameters")
_HARMLESS = ("shape", "device", "dtype", "ndim", "size")
#: How a transposition of the last two dimensions is written, of one matrix and of all.
_LAST_TWO = {
    whole: [f"{a}, {b})" for a, b in ((-2, -1), (-1, -2), *others)]
    for whole, others in {False: ((0, 1), (1, 0)), True: ((1, 2), (2, 1))}.items()
}


@dataclass(frozen=True)
class Stack:
    """What a parameter was.

    Attributes:
        shape: (experts, out_features, in_features), or the last two the other way round.
        dtype: Of the parameter.
        columns: Whether they are the other way round.
        flat: Whether it was (experts * out_features, in_features).
        parts: Names of the projections that a matrix consists of on disk; none where the tensor is on disk.
        since: The first format of bases that have it taken apart.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: bool
    flat: bool = False
    parts: tuple[str, ...] = ()
    since: int = BASE_WITH_STACKS

    def place(self, index: int) -> int | slice:
        """Return where in the tensor a matrix is."""
        rows = self.shape[1]
        return slice(index * rows, (index + 1) * rows) if self.flat else index


class _Use(NamedTuple):
    """How a class uses a parameter.

    Attributes:
        columns: Whether x is multiplied by the columns of a matrix, not by its rows.
        since: The first format of bases that have it taken apart.
    """

    columns: bool
    since: int = BASE_WITH_STACKS


#: Stacks that are one matrix below the other, by the class that has them: how each is used, and the attribute that is
#: their number.
_FLAT: dict[str, tuple[dict[str, _Use], str]] = {
    "DbrxExpertGLU": ({"w1": _Use(False, BASE), "v1": _Use(False, BASE), "w2": _Use(True, BASE)}, "moe_num_experts")
}


class Columns(Conv1D):
    """x W, with a weight (in_features, out_features)."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__(out_features, in_features)
        self.weight = nn.Parameter(torch.empty(in_features, out_features, dtype=dtype))
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W."""
        return x @ self.weight


def take_apart(
    model: nn.Module,
    parts_on_disk: Callable[[str], Sequence[str] | None] = lambda name: (),
    version: int = BASE,
) -> dict[str, Stack]:
    """Replace the parameters of a model on the meta device that can be.

    Args:
        model: The model.
        parts_on_disk: Gives the projections of which the loader makes the matrices of a parameter, one below the other;
            none where it has the parameter on disk, None where it makes it in another way.
        version: Format of the base: what older ones have in one tensor is left.

    Returns:
        What each was, by name.
    """
    taken = {}
    for name, module in list(model.named_modules()):
        found = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            stack = _stack_of(module, key, parameter)
            if stack is None or any(child.isdigit() for child, _ in module.named_children()):
                continue
            parts = parts_on_disk(f"{name}.{key}")
            if parts is not None and len(parts) > 1 and stack.columns:
                continue  # parts one below the other are no layers' outputs side by side
            if parts:
                stack = replace(stack, parts=tuple(parts), since=BASE)
            if parts is not None and stack.since <= version:
                found[key] = stack
        for key, stack in found.items():
            delattr(module, key)
            _add_layers(module, key, stack)
            taken[f"{name}.{key}"] = stack
        if found:
            module.__class__ = _using_layers(type(module), tuple(found))  # type: ignore[arg-type]
            module.__dict__["_stacks"] = found
        if any(stack.flat for stack in found.values()):  # they are chosen from one module above
            above = model.get_submodule(name.rpartition(".")[0])
            above.__class__ = _using_layers(type(above), ())  # type: ignore[arg-type]
    return taken


def first_format(model: nn.Module) -> int | None:
    """Return the first format of bases that have all taken apart that has been; None if nothing has."""
    return max((stack.since for module in model.modules() for stack in taken_apart(module).values()), default=None)


def _stack_of(module: nn.Module, key: str, parameter: nn.Parameter) -> Stack | None:
    flat, count = _FLAT.get(type(module).__name__, ({}, ""))
    use = (flat or _uses(type(module))).get(key)  # type: ignore[arg-type]
    if use is None or parameter.ndim != (2 if flat else 3):
        return None
    shape = tuple(parameter.shape)
    if flat:
        experts = getattr(module, count)
        shape = experts, shape[0] // experts, shape[1]
    return Stack(shape, parameter.dtype, use.columns, flat=bool(flat), since=use.since)


def _add_layers(module: nn.Module, key: str, stack: Stack) -> None:
    experts, rows, columns = stack.shape
    parts = stack.parts or (key,)
    for i, part in product(range(experts), parts):
        with torch.device("meta"):
            if stack.columns:
                layer: nn.Module = Columns(columns, rows, stack.dtype)
            else:
                layer = nn.Linear(columns, rows // len(parts), bias=False, dtype=stack.dtype)
        if part == "weight":
            module.add_module(str(i), layer)
            continue
        if str(i) not in dict(module.named_children()):
            module.add_module(str(i), nn.ModuleDict())
        module.get_submodule(str(i)).add_module(part, layer)


def taken_apart(module: nn.Module) -> dict[str, Stack]:
    """Return what layers have taken the place of among the parameters of a module, by name."""
    found: dict[str, Stack] = module.__dict__.get("_stacks", {})
    return found


def is_taken_apart(module: nn.Module) -> bool:
    """Say whether layers have taken the place of a parameter of a module."""
    return bool(taken_apart(module))


@torch.no_grad()
def put_together(model: nn.Module) -> None:
    """Undo `take_apart`, with the weights that the layers have now; they must be plain ones again."""
    for module in list(model.modules()):
        if not is_taken_apart(module):
            continue
        stacks: dict[str, Stack] = module.__dict__.pop("_stacks")
        module.__class__ = type(module).__mro__[1]
        for key, stack in stacks.items():
            layers = [_layers(module, key, stack, i) for i in range(stack.shape[0])]
            matrices = [torch.cat([layer.weight for layer in parts]) for parts in layers]
            join = torch.cat if stack.flat else torch.stack
            module.register_parameter(key, nn.Parameter(join(matrices)))
        for i in range(max(stack.shape[0] for stack in stacks.values())):
            delattr(module, str(i))


def layer_of_stack(parameter: str, index: int) -> str:
    """Return the name of a layer that has taken the place of a matrix: what `stacked_place` undoes."""
    head, _, key = parameter.rpartition(".")
    return f"{head}.{index}" if key == "weight" else f"{head}.{index}.{key}"


def stacked_place(layer: str) -> tuple[str, int] | None:
    """Return which matrix of which parameter a layer was, by its name; None if it has no such name.

    `experts.3.gate_up_proj` was the fourth of `experts.gate_up_proj`, `input_linear.3` of `input_linear.weight`.
    """
    head, _, last = layer.rpartition(".")
    if last.isdigit():
        return f"{head}.weight", int(last)
    above, _, number = head.rpartition(".")
    return (f"{above}.{last}", int(number)) if number.isdigit() else None


def hardest(tokens: int, top_k: int, num_experts: int) -> list[int]:
    """Give the last experts every token, and the others one each where there are enough: no choice takes more.

    For tensors without values, by which the memory of a step is planned.

    What experts save for backward, and the gradients of vectors whose expert has any token, add up to the same however
    tokens are spread. What the backward of one expert, or of some that are computed together, needs goes with its
    tokens, and that of the last comes first, when all is still saved.
    """
    left, counts = tokens * top_k, [0] * num_experts
    for i in reversed(range(num_experts)):  # of which i are before it
        counts[i] = max(min(tokens, left - i), min(left, 1))
        left -= counts[i]
    return counts


def _layers(module: nn.Module, key: str, stack: Stack, index: int) -> list[Any]:
    parts = stack.parts or (key,)
    return [module.get_submodule(str(index) if part == "weight" else f"{index}.{part}") for part in parts]


def _product(x: torch.Tensor, layers: list[Any]) -> torch.Tensor:
    outputs: list[torch.Tensor] = [layer(x) for layer in layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


# ---- what the module's code finds


class _Products:
    """Stands for a tensor in products; what else is done to it is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and "tensor" in kwargs:  # one of torch.nn.init: the layers are filled by themselves
            return kwargs["tensor"]
        x, *rest = args
        other, bias = rest[0] if rest else None, (kwargs or {}).get("bias", rest[1] if len(rest) > 1 else None)
        if isinstance(x, torch.Tensor) and isinstance(other, _Products):
            linear = func is F.linear
            product = other.product(x, by_rows=linear) if linear or func in _PRODUCTS else None
            if product is not None:
                return product if bias is None else product + bias
        raise TypeError(f"{func} of experts that are decomposed one by one; only their products are known")

    def product(self, x: torch.Tensor, *, by_rows: bool) -> torch.Tensor | None:
        """Return x times the matrix, transposed if `by_rows`; None if the layers compute the other one."""
        raise NotImplementedError


_PRODUCTS = (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)


class _Matrix(_Products):
    def __init__(self, layers: list[Any], stack: Stack, *, transposed: bool = False) -> None:
        self.layers, self.stack, self.transposed = layers, stack, transposed
        shape = stack.shape[1:]
        self.shape, self.dtype = torch.Size(shape[::-1] if transposed else shape), stack.dtype

    @property
    def T(self) -> _Matrix:
        return _Matrix(self.layers, self.stack, transposed=not self.transposed)

    mT = T

    def transpose(self, dim0: int, dim1: int) -> _Matrix:
        return self.T if {dim0 % 2, dim1 % 2} == {0, 1} else self

    def float(self) -> _Matrix:  # the layer computes in the dtype of x
        return self

    def to(self, *args: Any, **kwargs: Any) -> _Matrix:
        return self

    def product(self, x: torch.Tensor, *, by_rows: bool) -> torch.Tensor | None:
        return None if (by_rows != self.transposed) is self.stack.columns else _product(x, self.layers)


class _Matrices(_Products):
    def __init__(self, module: nn.Module, key: str, *, transposed: bool = False) -> None:
        self.module, self.key, self.transposed = module, key, transposed
        self.stack = taken_apart(module)[key]
        experts, *shape = self.stack.shape
        self.shape = torch.Size((experts, *(shape[::-1] if transposed else shape)))
        self.dtype, self.ndim = self.stack.dtype, 3

    @property
    def device(self) -> torch.device:
        return next(_layers(self.module, self.key, self.stack, 0)[0].parameters()).device

    @property
    def mT(self) -> _Matrices:
        return _Matrices(self.module, self.key, transposed=not self.transposed)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def transpose(self, dim0: int, dim1: int) -> _Matrices:
        if {dim0 % 3, dim1 % 3} != {1, 2}:
            raise TypeError(f"experts that are decomposed one by one cannot be transposed over dimensions {dim0, dim1}")
        return self.mT

    def view(self, *shape: Any) -> _Matrices:
        rows = shape[0] if len(shape) == 1 else shape
        if tuple(rows)[1:] != tuple(self.shape)[1:] or rows[0] not in (-1, len(self)):
            raise TypeError(f"experts that are decomposed one by one cannot be viewed as {tuple(rows)}")
        return self

    def float(self) -> _Matrices:
        return self

    def to(self, *args: Any, **kwargs: Any) -> _Matrices:
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> _Matrix:
        layers = _layers(self.module, self.key, self.stack, int(index))
        return _Matrix(layers, self.stack, transposed=self.transposed)

    def __iter__(self) -> Iterator[_Matrix]:
        return (self[i] for i in range(len(self)))

    def product(self, x: torch.Tensor, *, by_rows: bool) -> torch.Tensor | None:
        if (by_rows != self.transposed) is self.stack.columns or x.ndim != 3:
            return None
        layers = (_layers(self.module, self.key, self.stack, i) for i in range(len(self)))
        return torch.stack([_product(rows, found) for rows, found in zip(x, layers, strict=True)])


@cache
def _using_layers(module_class: Any, keys: tuple[str, ...]) -> Any:
    """Return a class of modules whose code finds stand-ins under some names, and is the class's own."""
    found: dict[str, Any] = {key: property(partial(_Matrices, key=key)) for key in keys}
    own = getattr(module_class.forward, "__wrapped__", module_class.forward)  # not an exchanged implementation

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_with_values(value, self) for value in args)
        kwargs = {name: _with_values(value, self) for name, value in kwargs.items()}
        return own(self, *args, **kwargs)

    found["forward"] = forward
    return type(module_class.__name__, (module_class,), found | {"__module__": module_class.__module__})


def _with_values(value: Any, module: nn.Module) -> Any:
    """Give a choice of experts, (tokens, k), that has no values those that take the most: a planner asks for them."""
    if not (isinstance(value, torch.Tensor) and value.is_meta and value.dtype == torch.int64 and value.ndim == 2):
        return value
    tokens, top_k = value.shape
    stacks = taken_apart(next(filter(is_taken_apart, module.modules())))
    experts = next(iter(stacks.values())).shape[0]
    counts = torch.tensor(hardest(tokens, top_k, experts))
    return torch.arange(experts).repeat_interleave(counts).view(top_k, tokens).T


# ---- which parameters


@cache
def _uses(module_class: Any) -> dict[str, _Use]:
    """Return the attributes that a class uses as stacks of matrices alone, and how."""
    if module_class.__module__.startswith("torch."):
        return {}
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(module_class))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    found: dict[str, set[_Use | None]] = {}
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and method.name not in _SETUP:
            for key, use in _found_in(method, []):
                found.setdefault(key, set()).add(use)
    alike = {key: [use for use in uses if use is not None] for key, uses in found.items() if None not in uses}
    return {
        key: _Use(uses[0].columns, max(use.since for use in uses))
        for key, uses in alike.items()
        if len({use.columns for use in uses}) == 1
    }


def _found_in(node: ast.AST, parents: list[ast.AST]) -> Iterator[tuple[str, _Use | None]]:
    """Give each attribute of `self` that is read, and how it is multiplied by; None if it is not so used."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        above = parents[-1]
        if isinstance(above, ast.Attribute) and above.attr in _HARMLESS:
            return
        if isinstance(above, ast.Compare) and isinstance(above.ops[0], (ast.Is, ast.IsNot)):
            return
        yield node.attr, _use(node, parents)
    for child in ast.iter_child_nodes(node):
        yield from _found_in(child, [*parents, node])


def _use(operand: ast.AST, parents: list[ast.AST]) -> _Use | None:
    """Return how an attribute is multiplied by: one of its matrices, or all, perhaps transposed or cast before."""
    whole, transposed, since, above = True, False, BASE_WITH_STACKS, list(parents)
    while True:
        parent = above.pop()
        if isinstance(parent, ast.Subscript) and parent.value is operand and whole:
            if isinstance(parent.slice, ast.Slice):
                return None
            whole = False
        elif isinstance(parent, ast.Attribute) and parent.attr in ("float", "to"):
            since, parent = BASE, above.pop()  # the call
        elif isinstance(parent, ast.Attribute) and parent.attr in ("T", "mT", "transpose"):
            if whole and parent.attr == "T":
                return None  # of all dimensions
            if parent.attr == "transpose":
                parent = above.pop()
                if not isinstance(parent, ast.Call) or ast.unparse(parent).rpartition("(")[2] not in _LAST_TWO[whole]:
                    return None
            since, transposed = BASE, not transposed
        else:
            break
        operand = parent
    columns = _columns(parent, operand, whole=whole)
    return None if columns is None else _Use(columns != transposed, since)


def _columns(use: ast.AST, operand: ast.AST, *, whole: bool) -> bool | None:
    if isinstance(use, ast.BinOp):
        return True if isinstance(use.op, ast.MatMult) and use.right is operand else None
    if not isinstance(use, ast.Call) or len(use.args) < 2 or use.args[1] is not operand:
        return None
    name = ast.unparse(use.func).rpartition(".")[2]
    if name == "linear":
        return None if whole else False
    return True if name == "bmm" or (name in ("matmul", "mm") and not whole) else None
