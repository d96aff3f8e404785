"""Leave qosora: a base and adapters become files that programs load which know nothing of qosora.

| module | one line |
|---|---|
| `adapters.py` | adapters as files, checked against their base, and combined |
| `source.py` | a base and adapters as files, read tensor by tensor |
| `original.py` | the model that a base was made of, checked to be that |
| `merged.py` | a checkpoint of merged weights, onto dequantized or original ones |
| `lora.py` | a PEFT LoRA of the original model |
| `verify.py` | compares an export's logits with the adapted model's |
| `outsider.py` | the program without qosora that loads the export for that |
"""

from qosora.export.lora import LoraReport, export_lora
from qosora.export.merged import ExportReport, export_merged

__all__ = ["ExportReport", "LoraReport", "export_lora", "export_merged"]
