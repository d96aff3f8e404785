"""Leave qosora: a base and adapters become files that programs load which know nothing of qosora.

| module | one line |
|---|---|
| `adapters` | adapters as files, checked against their base, and combined |
| `stored` | a base and adapters as files, read tensor by tensor |
| `original` | the model that a base was made of, checked to be that |
| `outsider` | the program without qosora that loads the export for that |
| `verify` | compares an export's logits with the adapted model's |
| `run` | one run of an export, of either kind |
| `merged` | a checkpoint of merged weights, onto dequantized or original ones |
| `lora_stacks` | experts as LoRAs of whole parameters |
| `lora` | a PEFT LoRA of the original model |
| `gguf_converter` | llama.cpp's converter, for tokenizers that it has no name for |
| `llama_cpp` | llama.cpp's programs: found, and run |
| `modelfile` | what Ollama wants beside a GGUF file |
| `gguf` | a GGUF file of merged weights |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.export.gguf import GGUF_KINDS as GGUF_KINDS
    from qosora.export.gguf import GgufReport as GgufReport
    from qosora.export.gguf import export_gguf as export_gguf
    from qosora.export.lora import LoraReport as LoraReport
    from qosora.export.lora import export_lora as export_lora
    from qosora.export.merged import ExportReport as ExportReport
    from qosora.export.merged import export_merged as export_merged

__getattr__, __dir__ = door(
    __name__,
    {
        "merged": ["ExportReport", "export_merged"],
        "lora": ["LoraReport", "export_lora"],
        "gguf": ["GGUF_KINDS", "GgufReport", "export_gguf"],
    },
)
