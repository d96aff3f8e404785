"""bitsandbytes: kernels of the 4-bit format, states of optimizers, and QLoRA's layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qosora.compat.names import ENTRIES, found, uses

if TYPE_CHECKING:
    import torch

_OPS = "torch.ops.bitsandbytes"
_OPTIMIZER = "bitsandbytes.optim.optimizer.Optimizer8bit"

_FOUND = found(
    __name__,
    {
        # The operators, and not bitsandbytes.functional's wrappers of them, take and give plain tensors, and are what
        # torch.compile and a dispatch mode see.
        "quantize_4bit": f"{_OPS}.quantize_4bit.default(A, blocksize, quant_type, quant_storage)",
        "dequantize_4bit": f"{_OPS}.dequantize_4bit.default(A, absmax, blocksize, quant_type, shape, dtype)",
        "quantize_blockwise": f"{_OPS}.quantize_blockwise.default(A, code, blocksize)",
        "dequantize_blockwise": f"{_OPS}.dequantize_blockwise.default(A, absmax, code, blocksize, dtype)",
        "gemm_4bit": f"{_OPS}.gemm_4bit.default",
        # The tables of the two formats.
        "create_dynamic_map": "bitsandbytes.functional.create_dynamic_map",
        "get_4bit_type": "bitsandbytes.functional.get_4bit_type(typename, device)",
    },
)


def __getattr__(name: str) -> Any:
    return _FOUND(name)


#: Its name, under which a dispatch mode sees it.
GEMM_4BIT = "bitsandbytes::gemm_4bit"
#: The logger that says, on import, that an optional package is missing.
CPU_LOGGER = "bitsandbytes.backends.cpu.ops"

#: Elements from which on a parameter's states are paged.
PAGED_NUMEL = 100_000
#: Elements below which its states have 32 bits, in the optimizers with 8 bits, too.
SMALL_NUMEL = 4096

ENTRIES.extend(
    (
        f"{CPU_LOGGER}.logger",
        f"{_OPTIMIZER}.get_state_buffer: {PAGED_NUMEL}",
        "bitsandbytes.optim.optimizer.Optimizer2State(min_8bit_size)",
        "bitsandbytes.optim.optimizer.Optimizer1State(min_8bit_size)",
        # Keys of a parameter's state: the packs save the tensors and the step, and keep the tables of 8-bit values.
        "bitsandbytes.optim.optimizer.Optimizer2State.init_state: step",
        "bitsandbytes.optim.optimizer.Optimizer2State.init_state: qmap1",
    )
)


@uses(f"{_OPTIMIZER}.init_state(group, p, gindex, pindex)")
def allocate_states(optimizer: Any) -> None:
    """Have an optimizer of a single parameter make its states, as its first step would, for a saved one to fill."""
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]
    optimizer.init_state(group, parameter, 0, 0)


@contextmanager
def launching(tensor: torch.Tensor) -> Iterator[None]:
    """Be where bitsandbytes' optimizers and quantization launch for a tensor: on its device, in the default stream.

    They take the current device's, and stream 0, whatever torch's current stream is: so what is in that comes before,
    and what follows in it after.
    """
    import torch

    if not tensor.is_cuda:
        yield
        return
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        if current == default:
            yield
            return
        default.wait_stream(current)
        yield
        current.wait_stream(default)


@uses(f"{_OPTIMIZER}.get_state_buffer: get_paged", "bitsandbytes.functional.get_paged: is_paged")
def is_paged(tensor: torch.Tensor) -> bool:
    """Say whether a state lies in managed memory, which CUDA's allocator does not count."""
    paged: bool = getattr(tensor, "is_paged", False)
    return paged


@uses(
    "bitsandbytes.nn.Params4bit: quant_state",
    "bitsandbytes.functional.QuantState(absmax, code, offset, state2)",
)
def quant_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors behind a parameter of bitsandbytes' own 4-bit layers; none for any other."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    nested = [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]
    return [state.absmax, state.code, *nested]


_CEXTENSION = "bitsandbytes.cextension"


@uses(f"{_CEXTENSION}.lib", f"{_CEXTENSION}.ErrorHandlerMockBNBNativeLibrary: error_msg")
def why_no_library() -> str | None:
    """Return why its compiled library is not loaded, in a line, or None where it is: a stand-in fails at first use."""
    from bitsandbytes import cextension

    stands_in = isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    return str(cextension.lib.error_msg).strip().partition("\n")[0] if stands_in else None


_LAYER = "bitsandbytes.nn.Linear4bit"


@uses(
    f"{_LAYER}: compute_dtype",
    f"{_LAYER}: compute_type_is_set",
    f"{_LAYER}: quant_storage",
    f"{_LAYER}: quant_state",
    f"{_LAYER}: support_avx512bf16_for_cpu",
    "bitsandbytes.nn.Params4bit: quant_type",
    "bitsandbytes.nn.Params4bit: compress_statistics",
    "bitsandbytes.nn.Params4bit: bnb_quantized",
    "bitsandbytes.nn.Params4bit: blocksize",
    "bitsandbytes.functional.QuantState(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)",
)
def fill_linear4bit(layer: Any, parts: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
    """Give a `Linear4bit` whose `__init__` did not run what its forward reads: a `Params4bit` refuses the meta device.

    Args:
        layer: An initialised `nn.Module` with in_features, out_features and bias.
        parts: What double quantization of its weight stores, with keys as in `decompose.nf4`.
        shape: Of the weight.
        dtype: Of the weight, dequantized.
    """
    import torch
    from bitsandbytes.functional import QuantState
    from torch import nn

    device = parts["packed"].device
    nested = QuantState(
        absmax=parts["absmax_scale"], code=torch.empty(256, device=device), blocksize=256, dtype=torch.float32
    )
    state = QuantState(
        absmax=parts["absmax"], shape=shape, code=torch.empty(16, device=device), blocksize=64, quant_type="nf4",
        dtype=dtype, offset=parts["absmax_offset"], state2=nested,
    )  # fmt: skip
    weight: Any = nn.Parameter(parts["packed"].view(-1, 1), requires_grad=False)
    weight.quant_state, weight.quant_type, weight.compress_statistics = state, "nf4", True
    weight.bnb_quantized, weight.blocksize = True, 64
    layer.weight, layer.quant_state = weight, state
    layer.compute_dtype, layer.compute_type_is_set = None, False
    layer.quant_storage, layer.support_avx512bf16_for_cpu = torch.uint8, False


#: Rows of a weight that its layer repacks together, on a CPU.
REPACKED_ROWS = 32


@uses(
    f"{_LAYER}.forward: packing_format_for_cpu",
    f"{_LAYER}: quant_state",
    "bitsandbytes.nn.Params4bit(data, quant_state, blocksize, quant_type, module, bnb_quantized)",
    "bitsandbytes.functional.QuantState(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)",
)
def linear4bit(
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
    quant_type: str,
    blocksize: int,
    *,
    table: torch.Tensor,
    absmax_code: torch.Tensor,
) -> Any:
    """Return bitsandbytes' layer of a weight that is quantized already, on the same memory, to compute in bfloat16.

    In evaluation, on a CPU with AVX512-BF16, it repacks the weight at its first use, into memory of its own.

    Args:
        parts: What double quantization of the weight stores, with keys as in `decompose.nf4`.
        shape: (out_features, in_features).
        quant_type: "nf4" or "fp4".
        blocksize: Values per block.
        table: (16,), float32, of the format.
        absmax_code: (256,), float32, of the absmax values.
    """
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    nested = QuantState(absmax=parts["absmax_scale"], code=absmax_code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=parts["absmax"], shape=torch.Size(shape), code=table, blocksize=blocksize, quant_type=quant_type,
        dtype=torch.bfloat16, offset=parts["absmax_offset"], state2=nested,
    )  # fmt: skip
    with torch.device("meta"):
        layer: Any = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type=quant_type)
    layer.weight = Params4bit(
        parts["packed"].view(-1, 1), quant_state=state, blocksize=blocksize, quant_type=quant_type,
        bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    return layer.eval()
