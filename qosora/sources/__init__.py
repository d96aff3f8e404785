"""Checkpoints to convert, whatever the files: every kind is read tensor by tensor, through one interface.

| module | one line |
|---|---|
| `source.py` | finds the files of a checkpoint, refuses what is quantized already, gives a reader |
| `pickled.py` | reader of `pytorch_model.bin` and its shards |
| `gguf_model.py` | reader of a GGUF file as an ordinary checkpoint; its config and tokenizer |
| `gguf_file.py` | the GGUF container: where the tensors are, and their values |
"""

from qosora.sources.source import SourceCheckpoint, TensorReader, open_source

__all__ = ["SourceCheckpoint", "TensorReader", "open_source"]
