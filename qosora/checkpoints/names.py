"""Names of files on disk, each said once: whoever reads or writes one takes its name from here."""

from __future__ import annotations

#: A model: its configuration, its weights in one file, or in shards with an index.
CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
#: What stands for "model" in the names of an adapter's files.
ADAPTER_STEM = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
#: What `quantize` and `export` tell about a folder that they made.
MANIFEST_NAME = "qosora_manifest.json"
