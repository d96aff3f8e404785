"""Quantized OSoRA: fine-tune large language models with 4-bit SVD factors and two float32 vectors per layer.

Names are imported on first use (PEP 562), so that `import qosora` costs nothing; `register()`, which every name that
needs it triggers, makes transformers and PEFT know the "qosora" quantization and the "OSORA" adapter.
"""
