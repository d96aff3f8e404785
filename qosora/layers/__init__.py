"""What computes: the decomposed layer, mixtures of experts, tiles.

| module | one line |
|---|---|
| `device` | which device a computation is for |
| `precision` | which dtype a CPU computes quickly in |
| `triton_ops` | operations on 4-bit tensors as Triton kernels |
| `ops` | the same operations in plain PyTorch, and which of the two runs |
| `product` | the layer's product and its gradients |
| `kept` | what a layer keeps while it generates on a CPU |
| `linear` | `QosoraLinear` |
| `grouped` | the products of many small layers together |
| `vocabulary` | quantized embeddings and output layer |
| `found` | which modules are linear layers that can be replaced |
| `stacks` | experts that are one tensor on disk as linear layers |
| `experts` | experts that the loader stacks as linear layers |
| `tiling` | MLPs and norms in tiles along the sequence |
| `decoder` | the decoder's layers of a model, found and compiled |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.layers.decoder import backbone_module as backbone_module
    from qosora.layers.decoder import compile_layers as compile_layers
    from qosora.layers.decoder import decoder_layers as decoder_layers
    from qosora.layers.decoder import exchanged_forward as exchanged_forward
    from qosora.layers.decoder import name_backbone as name_backbone
    from qosora.layers.decoder import require_checkpointing as require_checkpointing
    from qosora.layers.device import peaks_alone as peaks_alone
    from qosora.layers.device import planning_for as planning_for
    from qosora.layers.experts import LinearExperts as LinearExperts
    from qosora.layers.experts import parts_on_disk as parts_on_disk
    from qosora.layers.experts import projections_of as projections_of
    from qosora.layers.experts import router_names as router_names
    from qosora.layers.experts import split_experts as split_experts
    from qosora.layers.experts import stack_experts as stack_experts
    from qosora.layers.experts import stacked_names as stacked_names
    from qosora.layers.experts import without_stacking as without_stacking
    from qosora.layers.found import linear_layers as linear_layers
    from qosora.layers.found import read_directly as read_directly
    from qosora.layers.found import weights_read as weights_read
    from qosora.layers.linear import Member as Member
    from qosora.layers.linear import QosoraLinear as QosoraLinear
    from qosora.layers.linear import float32_kept as float32_kept
    from qosora.layers.linear import qosora_modules as qosora_modules
    from qosora.layers.linear import updated as updated
    from qosora.layers.ops import dequantize as dequantize
    from qosora.layers.ops import fused as fused
    from qosora.layers.ops import why_unfused as why_unfused
    from qosora.layers.precision import fast_dtype as fast_dtype
    from qosora.layers.precision import slowdown as slowdown
    from qosora.layers.stacks import Stack as Stack
    from qosora.layers.stacks import first_format as first_format
    from qosora.layers.stacks import is_taken_apart as is_taken_apart
    from qosora.layers.stacks import layer_of_stack as layer_of_stack
    from qosora.layers.stacks import put_together as put_together
    from qosora.layers.stacks import stacked_place as stacked_place
    from qosora.layers.stacks import take_apart as take_apart
    from qosora.layers.stacks import taken_apart as taken_apart
    from qosora.layers.tiling import Tiling as Tiling
    from qosora.layers.tiling import apply_tiling as apply_tiling
    from qosora.layers.vocabulary import STORE as STORE
    from qosora.layers.vocabulary import DecomposedMatrix as DecomposedMatrix
    from qosora.layers.vocabulary import EightBitMatrix as EightBitMatrix
    from qosora.layers.vocabulary import QosoraEmbedding as QosoraEmbedding
    from qosora.layers.vocabulary import QosoraHead as QosoraHead
    from qosora.layers.vocabulary import VocabularyMatrix as VocabularyMatrix
    from qosora.layers.vocabulary import embedding_name as embedding_name
    from qosora.layers.vocabulary import layers_on_disk as layers_on_disk
    from qosora.layers.vocabulary import panel_of as panel_of
    from qosora.layers.vocabulary import plain_vocabulary as plain_vocabulary
    from qosora.layers.vocabulary import quantized_modules as quantized_modules

__getattr__, __dir__ = door(
    __name__,
    {
        "device": ["peaks_alone", "planning_for"],
        "precision": ["fast_dtype", "slowdown"],
        "ops": ["dequantize", "fused", "why_unfused"],
        "linear": ["Member", "QosoraLinear", "float32_kept", "qosora_modules", "updated"],
        "vocabulary": [
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
        ],
        "found": ["linear_layers", "read_directly", "weights_read"],
        "experts": [
            "LinearExperts",
            "parts_on_disk",
            "projections_of",
            "router_names",
            "split_experts",
            "stack_experts",
            "stacked_names",
            "without_stacking",
        ],
        "stacks": [
            "Stack",
            "first_format",
            "is_taken_apart",
            "layer_of_stack",
            "put_together",
            "stacked_place",
            "take_apart",
            "taken_apart",
        ],
        "tiling": ["Tiling", "apply_tiling"],
        "decoder": [
            "backbone_module",
            "compile_layers",
            "decoder_layers",
            "exchanged_forward",
            "name_backbone",
            "require_checkpointing",
        ],
    },
)
