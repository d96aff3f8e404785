"""Training and evaluation data: rows, then tokens, then batches.

| module | one line |
|---|---|
| `chat` | chats as text, by any template, and where each turn stands |
| `records` | files and hub data sets, checked row by row |
| `tokens` | records to token ids and labels |
| `fit` | whether tokens fit a model |
| `batch` | examples of different lengths, padded |
| `classes` | texts and words with classes, as tokens and batches |
| `vision` | examples with images |
| `prepared` | records as a trainer takes them |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.data.batch import batches_by_length as batches_by_length
    from qosora.data.batch import padded as padded
    from qosora.data.batch import padded_batch as padded_batch
    from qosora.data.chat import encode as encode
    from qosora.data.chat import refuse_broken_text as refuse_broken_text
    from qosora.data.chat import render as render
    from qosora.data.chat import template_options as template_options
    from qosora.data.chat import text_of as text_of
    from qosora.data.classes import ClassExample as ClassExample
    from qosora.data.classes import class_batch as class_batch
    from qosora.data.classes import tokenize_classes as tokenize_classes
    from qosora.data.fit import embedding_rows as embedding_rows
    from qosora.data.fit import learned_positions as learned_positions
    from qosora.data.fit import most_positions as most_positions
    from qosora.data.fit import pad_within as pad_within
    from qosora.data.fit import refuse_foreign_tokens as refuse_foreign_tokens
    from qosora.data.fit import refuse_too_long as refuse_too_long
    from qosora.data.fit import refuse_unfit as refuse_unfit
    from qosora.data.prepared import Prepared as Prepared
    from qosora.data.prepared import prepare as prepare
    from qosora.data.records import Columns as Columns
    from qosora.data.records import Records as Records
    from qosora.data.records import load_records as load_records
    from qosora.data.records import no_progress_bars as no_progress_bars
    from qosora.data.records import split_to_measure as split_to_measure
    from qosora.data.tokens import IGNORED as IGNORED
    from qosora.data.tokens import Example as Example
    from qosora.data.tokens import Tokenized as Tokenized
    from qosora.data.tokens import tokenize as tokenize
    from qosora.data.vision import SeenExample as SeenExample
    from qosora.data.vision import Seer as Seer
    from qosora.data.vision import open_image as open_image

__getattr__, __dir__ = door(
    __name__,
    {
        "chat": ["encode", "refuse_broken_text", "render", "template_options", "text_of"],
        "records": ["Columns", "Records", "load_records", "no_progress_bars", "split_to_measure"],
        "tokens": ["Example", "IGNORED", "Tokenized", "tokenize"],
        "prepared": ["Prepared", "prepare"],
        "fit": [
            "embedding_rows",
            "learned_positions",
            "most_positions",
            "pad_within",
            "refuse_foreign_tokens",
            "refuse_too_long",
            "refuse_unfit",
        ],
        "batch": ["batches_by_length", "padded", "padded_batch"],
        "vision": ["SeenExample", "Seer", "open_image"],
        "classes": ["ClassExample", "class_batch", "tokenize_classes"],
    },
)
