"""Experts that a module holds in one tensor, also on disk: one linear layer for each, used by the module's own code.

gpt-oss, Llama 4 and others multiply by `self.gate_up_proj[i]`, a matrix of a parameter (experts, ., .). A matrix is
what is decomposed. So the parameter is taken apart into layers `0.gate_up_proj`, `1.gate_up_proj`, ..., and what the
module's code finds under the parameter's name is a stand-in, whose products are the layers' outputs. Gates, biases,
routing stay as they are.

Which parameters can be taken apart is read off the class's code: those that it uses as `F.linear(x, self.p[i])`, or as
`x @ self.p[i]` and `torch.bmm(x, self.p)`, and in no other way. The two differ in how a matrix is stored.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Stack", "hardest", "is_taken_apart", "layer_of_stack", "put_together", "stacked_place", "take_apart"]

_SETUP = ("__init__", "_init_weights", "reset_parameters")
_HARMLESS = ("shape", "device", "dtype", "ndim", "size")


class Stack(NamedTuple):
    """What a parameter was.

    Attributes:
        shape: (experts, out_features, in_features), or the last two the other way round.
        dtype: Of the parameter.
        columns: Whether they are the other way round.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: bool


class Columns(Conv1D):
    """x W, with a weight (in_features, out_features)."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__(out_features, in_features)
        self.weight = nn.Parameter(torch.empty(in_features, out_features, dtype=dtype))
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W."""
        return x @ self.weight


def take_apart(model: nn.Module, is_made: Callable[[str], bool] = lambda name: False) -> dict[str, int]:
    """Replace the parameters of a model on the meta device that can be.

    Args:
        model: The model.
        is_made: Says whether the loader makes a parameter of several tensors, so that it is not one on disk.

    Returns:
        Their names, and how many matrices each held.
    """
    taken = {}
    for name, module in list(model.named_modules()):
        found = {}
        for key, parameter in list(module.named_parameters(recurse=False)):
            columns = _uses(type(module)).get(key)  # type: ignore[arg-type]
            if columns is None or parameter.ndim != 3 or is_made(f"{name}.{key}"):
                continue
            if not any(child.isdigit() for child, _ in module.named_children()):
                found[key] = Stack(tuple(parameter.shape), parameter.dtype, columns)
        for key, stack in found.items():
            delattr(module, key)
            _add_layers(module, key, stack)
            taken[f"{name}.{key}"] = stack.shape[0]
        if found:
            module.__class__ = _using_layers(type(module), tuple(found))  # type: ignore[arg-type]
            module.__dict__["_stacks"] = found
    return taken


def _add_layers(module: nn.Module, key: str, stack: Stack) -> None:
    experts, rows, columns = stack.shape
    for i in range(experts):
        with torch.device("meta"):
            if stack.columns:
                layer: nn.Module = Columns(columns, rows, stack.dtype)
            else:
                layer = nn.Linear(columns, rows, bias=False, dtype=stack.dtype)
        if key == "weight":
            module.add_module(str(i), layer)
            continue
        if str(i) not in dict(module.named_children()):
            module.add_module(str(i), nn.ModuleDict())
        module.get_submodule(str(i)).add_module(key, layer)


def is_taken_apart(module: nn.Module) -> bool:
    """Say whether layers have taken the place of a parameter of a module."""
    return "_stacks" in module.__dict__


@torch.no_grad()
def put_together(model: nn.Module) -> None:
    """Undo `take_apart`, with the weights that the layers have now; they must be plain ones again."""
    for module in list(model.modules()):
        if not is_taken_apart(module):
            continue
        stacks: dict[str, Stack] = module.__dict__.pop("_stacks")
        module.__class__ = type(module).__mro__[1]
        for key, stack in stacks.items():
            layers: list[Any] = [_layer(module, key, i) for i in range(stack.shape[0])]
            module.register_parameter(key, nn.Parameter(torch.stack([layer.weight for layer in layers])))
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


def _layer(module: nn.Module, key: str, index: int) -> Any:
    return module.get_submodule(str(index) if key == "weight" else f"{index}.{key}")


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
    def __init__(self, layer: Any, stack: Stack) -> None:
        self.layer, self.stack = layer, stack
        self.shape, self.dtype = torch.Size(stack.shape[1:]), stack.dtype

    def product(self, x: torch.Tensor, *, by_rows: bool) -> torch.Tensor | None:
        return None if by_rows is self.stack.columns else self.layer(x)


class _Matrices(_Products):
    def __init__(self, module: nn.Module, key: str) -> None:
        self.module, self.key = module, key
        self.stack: Stack = module.__dict__["_stacks"][key]
        self.shape, self.dtype, self.ndim = torch.Size(self.stack.shape), self.stack.dtype, 3

    @property
    def device(self) -> torch.device:
        return next(_layer(self.module, self.key, 0).parameters()).device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> _Matrix:
        return _Matrix(_layer(self.module, self.key, int(index)), self.stack)

    def __iter__(self) -> Iterator[_Matrix]:
        return (self[i] for i in range(len(self)))

    def product(self, x: torch.Tensor, *, by_rows: bool) -> torch.Tensor | None:
        if by_rows or not self.stack.columns or x.ndim != 3:
            return None
        return torch.stack([_layer(self.module, self.key, i)(rows) for i, rows in enumerate(x)])


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
    experts = next(iter(module.__dict__["_stacks"].values())).shape[0]
    counts = torch.tensor(hardest(tokens, top_k, experts))
    return torch.arange(experts).repeat_interleave(counts).view(top_k, tokens).T


# ---- which parameters


@cache
def _uses(module_class: Any) -> dict[str, bool]:
    """Return the attributes that a class uses as stacks of matrices alone: whether x is multiplied by columns."""
    if module_class.__module__.startswith("torch."):
        return {}
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(module_class))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    found: dict[str, set[bool | None]] = {}
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and method.name not in _SETUP:
            for key, columns in _found_in(method, []):
                found.setdefault(key, set()).add(columns)
    kinds = {key: uses for key, uses in found.items() if len(uses) == 1}
    return {key: columns for key, (columns,) in kinds.items() if columns is not None}


def _found_in(node: ast.AST, parents: list[ast.AST]) -> Iterator[tuple[str, bool | None]]:
    """Give each attribute of `self` that is read, and how it is multiplied by; None if it is not so used."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        above = parents[-1]
        if isinstance(above, ast.Attribute) and above.attr in _HARMLESS:
            return
        if isinstance(above, ast.Compare) and isinstance(above.ops[0], (ast.Is, ast.IsNot)):
            return
        taken = isinstance(above, ast.Subscript) and above.value is node and not isinstance(above.slice, ast.Slice)
        operand = above if taken else node
        use = parents[-2] if taken else above
        yield node.attr, _columns(use, operand, whole=not taken)
    for child in ast.iter_child_nodes(node):
        yield from _found_in(child, [*parents, node])


def _columns(use: ast.AST, operand: ast.AST, *, whole: bool) -> bool | None:
    if isinstance(use, ast.BinOp):
        return True if isinstance(use.op, ast.MatMult) and use.right is operand else None
    if not isinstance(use, ast.Call) or len(use.args) < 2 or use.args[1] is not operand:
        return None
    name = ast.unparse(use.func).rpartition(".")[2]
    if name == "linear":
        return None if whole else False
    return True if name == "bmm" or (name in ("matmul", "mm") and not whole) else None
