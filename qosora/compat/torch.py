"""PyTorch: storages' identities, operators by name, what modules hold, the compiler's limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qosora.compat.names import found, uses

if TYPE_CHECKING:
    import torch
    from torch import nn

_ATEN = "torch.ops.aten"
_ATTENTION = f"{_ATEN}._scaled_dot_product"

_FOUND = found(
    __name__,
    {
        # Sees every operation of a step, those of backward, too; a TorchFunctionMode is off there.
        "TorchDispatchMode": "torch.utils._python_dispatch.TorchDispatchMode",
        # The tensors in whatever a module returns, of classes that register themselves there.
        "tree_iter": "torch.utils._pytree.tree_iter(tree)",
        "tree_map": "torch.utils._pytree.tree_map(func, tree)",
        # One kernel for a list of tensors: the packs hold some hundred.
        "foreach_copy_": "torch._foreach_copy_",
        "foreach_zero_": "torch._foreach_zero_",
        # What scaled_dot_product_attention chooses from, for the planner to choose as the device would.
        "flash_attention": f"{_ATTENTION}_flash_attention.default(query, key, value, dropout_p, is_causal, scale)",
        "cpu_flash_attention": (
            f"{_ATTENTION}_flash_attention_for_cpu.default(query, key, value, dropout_p, is_causal, attn_mask, scale)"
        ),
        "efficient_attention": (
            f"{_ATTENTION}_efficient_attention.default"
            "(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale)"
        ),
        # The operations behind `tensor[indices]` and `tensor.item()`, whose results depend on values.
        "index": f"{_ATEN}.index.Tensor(self, indices)",
        "read_scalar": f"{_ATEN}._local_scalar_dense.default(self)",
        "to_copy": f"{_ATEN}._to_copy.default(self)",
    },
)


def __getattr__(name: str) -> Any:
    return _FOUND(name)


@uses(
    f"{_ATEN}.index.Tensor",
    f"{_ATTENTION}_flash_attention_backward.default(grad_out, query, key)",
    f"{_ATTENTION}_efficient_attention_backward.default(grad_out_, query)",
)
def cuda_operators() -> tuple[str, str, str]:
    """Return the names of indexing and of two attentions' backward: the planner knows what their kernels allocate."""
    attention = "aten::_scaled_dot_product_{}_attention_backward"
    return "aten::index", attention.format("flash"), attention.format("efficient")


@uses("torch.UntypedStorage._cdata")
def storage_key(tensor: torch.Tensor) -> int:
    """Return what identifies a tensor's storage as long as it lives: on the meta device it has no address."""
    return tensor.untyped_storage()._cdata


@uses("torch.Tensor._version")
def changes(tensor: torch.Tensor) -> int:
    """Return how often a tensor's values were written in place: autograd's own count."""
    return tensor._version


@uses("torch.nn.Module: _parameters")
def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict of a module's parameters: `named_parameters` leaves out those that are None or occur twice."""
    return module._parameters


@uses("torch.nn.Module: _buffers")
def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the dict of a module's buffers, to put others in, persistent or not."""
    return module._buffers


@uses("torch._dynamo.config.recompile_limit")
def allow_recompiles(count: int) -> None:
    """Let one piece of code be compiled so many times; beyond the limit it runs uncompiled, in silence."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def says_peer_is_gone(error: BaseException) -> bool:
    """Say whether an error of a collective operation is that another process does not answer."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


_DDP = "torch.nn.parallel.DistributedDataParallel"


@uses(f"{_DDP}._set_params_and_buffers_to_ignore_for_model(module, params_and_buffers_to_ignore)")
def ignore_in_ddp(module: nn.Module, names: list[str]) -> None:
    """Have DistributedDataParallel neither send nor average some parameters of a module."""
    from torch.nn.parallel import DistributedDataParallel

    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, names)


# An operator as a dispatch mode gets it, `torch.ops.aten.add.Tensor`, knows its schema.


@uses("torch._ops.OpOverload: _schema")
def operator_name(operator: Any) -> str:
    """Return an operator's name without the overload: "aten::add"."""
    name: str = operator._schema.name
    return name


def is_pure(operator: Any) -> bool:
    """Say whether an operator changes none of its arguments and returns no view of them."""
    return all(argument.alias_info is None for argument in operator._schema.arguments)


def result_count(operator: Any) -> int:
    """Return how many results an operator has."""
    return len(operator._schema.returns)
