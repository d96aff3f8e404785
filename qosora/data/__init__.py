"""Training and evaluation data: rows, then tokens, then batches.

| module | one line |
|---|---|
| `records` | files and hub data sets, checked row by row |
| `tokens` | records to token ids and labels |
| `batch` | examples of different lengths, padded |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.data.batch import padded as padded
    from qosora.data.batch import padded_batch as padded_batch
    from qosora.data.records import Columns as Columns
    from qosora.data.records import Records as Records
    from qosora.data.records import load_records as load_records
    from qosora.data.records import no_progress_bars as no_progress_bars
    from qosora.data.tokens import IGNORED as IGNORED
    from qosora.data.tokens import Example as Example
    from qosora.data.tokens import Tokenized as Tokenized
    from qosora.data.tokens import tokenize as tokenize

__getattr__, __dir__ = door(
    __name__,
    {
        "records": ["Columns", "Records", "load_records", "no_progress_bars"],
        "tokens": ["Example", "IGNORED", "Tokenized", "tokenize"],
        "batch": ["padded", "padded_batch"],
    },
)
