"""All tensors of a checkpoint, and their comparison."""

from __future__ import annotations

import torch

from qosora.checkpoints.source import TensorReader

State = dict[str, torch.Tensor]


def read(reader: TensorReader) -> State:
    """All tensors, each held against what the reader says of it."""
    state = {}
    for name in reader.names():
        tensor = reader.tensor(name)
        assert tensor.is_contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (reader.shape(name), reader.dtype(name))
        assert reader.file(name).is_file()
        state[name] = tensor
    return state


def assert_equal(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
