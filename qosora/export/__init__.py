"""Leave qosora: a base and an adapter become files that programs load which know nothing of qosora.

| module | one line |
|---|---|
| `source.py` | a base and an adapter as files, checked against each other, read tensor by tensor |
| `merged.py` | a checkpoint of dequantized, merged weights |
"""

from qosora.export.merged import ExportReport, export_merged

__all__ = ["ExportReport", "export_merged"]
