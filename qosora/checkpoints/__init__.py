"""Files as they come and go: what is read, what is written, and what may be where.

| module | one line |
|---|---|
| `names` | names of files, each said once |
| `folders` | folders on disk or a hub: found, checked, locked; JSON; what is copied along |
| `intact` | files compared with the hashes in their manifest |
| `reader` | sharded safetensors, read lazily |
| `shards` | the same, written tensor by tensor in any order |
| `fingerprint` | the identity of a base |
| `model_class` | which class of transformers a checkpoint is of |
| `stored_config` | what a folder holds, from its configuration alone |
| `pickled` | reader of `pytorch_model.bin` |
| `gguf_file` | the GGUF container |
| `gguf_model` | a GGUF file as an ordinary checkpoint |
| `source` | checkpoints to convert, of every kind, behind one reader |
| `unfinished` | a folder in the making: what is finished in it survives |
| `work` | makes such a folder unit by unit, in one process or many |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.checkpoints.fingerprint import base_fingerprint as base_fingerprint
    from qosora.checkpoints.fingerprint import eight_bit_scales as eight_bit_scales
    from qosora.checkpoints.fingerprint import group_modules as group_modules
    from qosora.checkpoints.fingerprint import stored_fingerprint as stored_fingerprint
    from qosora.checkpoints.folders import copy_files as copy_files
    from qosora.checkpoints.folders import expanded as expanded
    from qosora.checkpoints.folders import has_tokenizer as has_tokenizer
    from qosora.checkpoints.folders import local_folder as local_folder
    from qosora.checkpoints.folders import locked as locked
    from qosora.checkpoints.folders import read_json as read_json
    from qosora.checkpoints.folders import refuse_input_as_output as refuse_input_as_output
    from qosora.checkpoints.folders import require_space as require_space
    from qosora.checkpoints.folders import tokenizer_folder as tokenizer_folder
    from qosora.checkpoints.folders import write_atomically as write_atomically
    from qosora.checkpoints.folders import write_json as write_json
    from qosora.checkpoints.intact import file_digest as file_digest
    from qosora.checkpoints.intact import hashed as hashed
    from qosora.checkpoints.intact import manifest_key as manifest_key
    from qosora.checkpoints.intact import read_manifest as read_manifest
    from qosora.checkpoints.intact import recorded_files as recorded_files
    from qosora.checkpoints.intact import require_intact as require_intact
    from qosora.checkpoints.intact import tensor_hashes as tensor_hashes
    from qosora.checkpoints.intact import verify_files as verify_files
    from qosora.checkpoints.model_class import REWARD as REWARD
    from qosora.checkpoints.model_class import TAGS as TAGS
    from qosora.checkpoints.model_class import TASKS as TASKS
    from qosora.checkpoints.model_class import TEXTS as TEXTS
    from qosora.checkpoints.model_class import class_for_task as class_for_task
    from qosora.checkpoints.model_class import empty_model as empty_model
    from qosora.checkpoints.model_class import model_class_of as model_class_of
    from qosora.checkpoints.model_class import require_language_model as require_language_model
    from qosora.checkpoints.model_class import sees as sees
    from qosora.checkpoints.model_class import task_of as task_of
    from qosora.checkpoints.names import ADAPTER_CONFIG as ADAPTER_CONFIG
    from qosora.checkpoints.names import ADAPTER_STEM as ADAPTER_STEM
    from qosora.checkpoints.names import CONFIG_NAME as CONFIG_NAME
    from qosora.checkpoints.names import MANIFEST_NAME as MANIFEST_NAME
    from qosora.checkpoints.reader import CheckpointReader as CheckpointReader
    from qosora.checkpoints.shards import Shards as Shards
    from qosora.checkpoints.shards import StoredSpec as StoredSpec
    from qosora.checkpoints.shards import require_finite as require_finite
    from qosora.checkpoints.source import SourceCheckpoint as SourceCheckpoint
    from qosora.checkpoints.source import TensorReader as TensorReader
    from qosora.checkpoints.source import open_source as open_source
    from qosora.checkpoints.stored_config import adapter_config as adapter_config
    from qosora.checkpoints.stored_config import base_storage as base_storage
    from qosora.checkpoints.stored_config import load_config as load_config
    from qosora.checkpoints.stored_config import quantization_in as quantization_in
    from qosora.checkpoints.stored_config import require_base as require_base
    from qosora.checkpoints.stored_config import split_source as split_source
    from qosora.checkpoints.work import Processes as Processes
    from qosora.checkpoints.work import Progress as Progress
    from qosora.checkpoints.work import Unit as Unit
    from qosora.checkpoints.work import stream as stream

__getattr__, __dir__ = door(
    __name__,
    {
        "names": ["ADAPTER_CONFIG", "ADAPTER_STEM", "CONFIG_NAME", "MANIFEST_NAME"],
        "folders": [
            "copy_files",
            "expanded",
            "has_tokenizer",
            "local_folder",
            "locked",
            "read_json",
            "refuse_input_as_output",
            "require_space",
            "tokenizer_folder",
            "write_atomically",
            "write_json",
        ],
        "intact": [
            "file_digest",
            "hashed",
            "manifest_key",
            "read_manifest",
            "recorded_files",
            "require_intact",
            "tensor_hashes",
            "verify_files",
        ],
        "reader": ["CheckpointReader"],
        "shards": ["Shards", "StoredSpec", "require_finite"],
        "fingerprint": ["base_fingerprint", "eight_bit_scales", "group_modules", "stored_fingerprint"],
        "model_class": [
            "REWARD",
            "TAGS",
            "TASKS",
            "TEXTS",
            "class_for_task",
            "empty_model",
            "model_class_of",
            "require_language_model",
            "sees",
            "task_of",
        ],
        "stored_config": [
            "adapter_config",
            "base_storage",
            "load_config",
            "quantization_in",
            "require_base",
            "split_source",
        ],
        "source": ["SourceCheckpoint", "TensorReader", "open_source"],
        "work": ["Processes", "Progress", "Unit", "stream"],
    },
)
