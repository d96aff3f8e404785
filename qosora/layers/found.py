"""Which modules are linear layers that can be replaced: told by what they compute, and by who else uses their weight.

A class of transformers may derive from `nn.Linear` and compute the same, or something else. And a module may hand the
weight of a child to a fused operation, without calling the child: then nothing can take the child's place.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["linear_layers", "read_directly", "weights_read"]

#: Methods that fill or tie weights.
_SETUP = ("__init__", "_init_weights", "reset_parameters", "tie_weights")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return the modules that compute x Wᵀ + b and nothing else, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        or isinstance(module, Conv1D)
        or (isinstance(module, nn.Linear) and _computes_as_linear(type(module), module.bias is not None))  # type: ignore[arg-type]
    }


@cache
def _computes_as_linear(subclass: type[nn.Linear], bias: bool) -> bool:
    """Say whether a class computes what it derives from, by trying it on random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        probe = copy.copy(nn.Linear(6, 5, bias=bias))
        probe.__class__ = subclass
        for parameter in probe.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        x = torch.randn(2, 3, 6, generator=generator)
        try:
            found = probe(x)
        except Exception:  # it needs what only its own constructor gives it, so it is something else
            return False
        return isinstance(found, torch.Tensor) and torch.allclose(found, F.linear(x, probe.weight, probe.bias))


def read_directly(model: nn.Module) -> list[str]:
    """Return the linear layers whose weight another module reads in its code, without calling them."""
    linears = linear_layers(model)
    found = {name for names in weights_read(model).values() for name in names}
    changed = {f"{name}.*.{child}" for name, one in _classes(model) for child in _weights_changed(one)}  # type: ignore[arg-type]
    return [name for name in linears if name in found or any(_is_within(name, place) for place in changed)]


def weights_read(model: nn.Module, *, devices: bool = False) -> dict[str, set[str]]:
    """Return the modules whose weight others read in their code, without calling them, by the name of who reads.

    Args:
        model: The model.
        devices: Whether to read a weight's device is to read it.
    """
    there, found = {name for name, _ in model.named_modules()}, dict[str, set[str]]()
    for name, one in _classes(model):
        read = {f"{name}.{child}" if name else child for child in _weights_read(one, devices=devices)}  # type: ignore[arg-type]
        if read & there:
            found.setdefault(name, set()).update(read & there)
    return found


def _classes(model: nn.Module) -> Iterator[tuple[str, type[nn.Module]]]:
    """Give the names of a model's modules, each with every class whose code it runs."""
    for name, module in model.named_modules():
        for one in type(module).__mro__:
            if one not in (nn.Module, PreTrainedModel) and issubclass(one, nn.Module):
                yield name, one


def _is_within(name: str, place: str) -> bool:
    """Say whether a module is at a place such as `model.*.attention.output`, with a few modules for the asterisk."""
    start, _, end = place.partition("*")
    return name.startswith(start.removeprefix(".")) and name.endswith(end)


@cache
def _weights_changed(module_class: type[nn.Module]) -> frozenset[str]:
    """Return the ends of names of modules whose weight a class changes in place, as RWKV does with its layers'."""
    return frozenset(
        path.partition(".")[2]
        for method in _methods(module_class)
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_")
        if isinstance(weight := node.func.value, ast.Attribute) and weight.attr == "weight"
        if not (path := ast.unparse(weight.value)).startswith("self.") and "." in path
        if path.replace(".", "").isidentifier() and not node.func.attr.endswith("__")
    )


@cache
def _weights_read(module_class: type[nn.Module], *, devices: bool = False) -> frozenset[str]:
    """Return the children, with dots between them, whose weight a class of modules reads, or its device alone."""
    return frozenset(child for method in _methods(module_class) for child in _reads(method, devices))


def _methods(module_class: type[nn.Module]) -> list[ast.FunctionDef]:
    """Return the methods of a class, but those that set it up."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(module_class))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # without source, as in an interactive session
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _SETUP]


def _reads(method: ast.AST, devices: bool) -> Iterator[str]:
    if isinstance(method, (ast.If, ast.While)) and "uint8" in ast.unparse(method.test):
        return  # a cast to the weight's dtype, unless that is one of 4-bit weights
    if isinstance(method, ast.Attribute) and method.attr == "device" and not devices:
        return
    if isinstance(method, ast.Attribute) and method.attr == "weight":
        path = ast.unparse(method.value)
        if path.startswith("self.") and path.replace(".", "").isidentifier():
            yield path.removeprefix("self.")
    for node in ast.iter_child_nodes(method):
        yield from _reads(node, devices)
