"""What qosora relies on of other packages beyond their documentation: named, checked and wrapped here alone.

Names are imported from the module that says whose they are, `from qosora.compat.trl import TOKEN_CHUNK_SIZE`, and found
on first use: importing any of these modules imports nothing else. One that is gone ends the command that needs it with
a line that says which versions work.

| module | one line |
|---|---|
| `names` | entries, how they are checked, and the versions that were tried |
| `torch` | storages, operators, module internals |
| `bitsandbytes` | kernels of the 4-bit format, states of optimizers, QLoRA's layer |
| `transformers` | the loader's conversions, marks on models and parameters, GGUF tables |
| `peft` | which modules are adapted, warnings |
| `trl` | the fused loss, offloading |
| `hooks` | methods that our classes override, and tables that have entries of ours |
"""
