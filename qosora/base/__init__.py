"""A model whose linear layers are decomposed: made, stored, loaded, described.

| module | one line |
|---|---|
| `reports` | what a conversion says of the layers that it decomposed |
| `layout` | names, shapes and ties of the plain model |
| `structure` | which layers are decomposed |
| `load` | loads a base, with or without an adapter |
| `task` | a checkpoint with the head of another task |
| `calibrate` | how large a model's activations are, on some text |
| `quantizer` | the transformers side: from_pretrained, save_pretrained |
| `convert` | `quantize`: a checkpoint becomes a base, streamed |
| `check` | how far a base is from its original |
| `describe` | what a folder of ours holds |
| `inspected` | the same, remembered |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.base.check import Divergence as Divergence
    from qosora.base.check import divergence as divergence
    from qosora.base.convert import quantize as quantize
    from qosora.base.describe import verify as verify
    from qosora.base.layout import PlainModel as PlainModel
    from qosora.base.layout import natural_order as natural_order
    from qosora.base.load import TABLE_OF_TOKENS as TABLE_OF_TOKENS
    from qosora.base.load import fit_vocabulary as fit_vocabulary
    from qosora.base.load import load_adapted as load_adapted
    from qosora.base.load import load_adapter as load_adapter
    from qosora.base.load import load_base as load_base
    from qosora.base.load import load_model as load_model
    from qosora.base.load import load_processor as load_processor
    from qosora.base.load import load_tokenizer as load_tokenizer
    from qosora.base.load import rows_brought as rows_brought
    from qosora.base.reports import ConversionReport as ConversionReport
    from qosora.base.structure import decompose_structure as decompose_structure
    from qosora.base.structure import head_modules as head_modules
    from qosora.base.structure import skipped_modules as skipped_modules

__getattr__, __dir__ = door(
    __name__,
    {
        "structure": ["decompose_structure", "head_modules", "skipped_modules"],
        "layout": ["PlainModel", "natural_order"],
        "reports": ["ConversionReport"],
        "convert": ["quantize"],
        "check": ["Divergence", "divergence"],
        "describe": ["verify"],
        "load": [
            "TABLE_OF_TOKENS",
            "fit_vocabulary",
            "load_adapted",
            "load_adapter",
            "load_base",
            "load_model",
            "load_processor",
            "load_tokenizer",
            "rows_brought",
        ],
    },
)
