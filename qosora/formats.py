"""The versions of what qosora stores. A newer one than known is refused; every older one is read for good.

    base        `format_version` in config.json's quantization_config
                1, which has none: decomposed as it is.  2: `scale`, and c of each layer.
                3: experts that the model holds in one tensor are layers of their own
                4: `embeddings`: embeddings and output layer are decomposed, too.  5: or are in 8 bits
                6: more of such experts, those that the model casts or transposes, and DBRX's
    adapter     `format_version` in adapter_config.json
                1, or none: vectors.  2: `update_rank`, and A and B of each layer
                3: `trainable_token_indices`, and rows of embeddings
    manifest    `format_version` in qosora_manifest.json; 1, or none: bases', adapters' and exports'
    unfinished  `format_version` in OUT.partial/job.json; 1, or none
    run         `format_version` in made_of.json; 1, or none: a training run and its checkpoints

Whatever changes the meaning of a stored value, or adds one that an older version must not ignore, gets a new number
here, and files of the last one are added to `tests/stored`.
"""

from __future__ import annotations

from typing import Final

from qosora.errors import CheckpointError

__all__ = [
    "ADAPTER",
    "ADAPTER_WITHOUT_TOKENS",
    "BASE",
    "BASE_WITHOUT_STACKS",
    "BASE_WITH_EMBEDDINGS",
    "BASE_WITH_INT8",
    "BASE_WITH_STACKS",
    "MANIFEST",
    "RUN",
    "UNFINISHED",
    "require_known",
]

BASE: Final = 6
#: Of bases with embeddings in 8 bits, and in 4; with experts that are layers of their own, the first such; and without:
#: an older qosora reads them.
BASE_WITH_INT8: Final = 5
BASE_WITH_EMBEDDINGS: Final = 4
BASE_WITH_STACKS: Final = 3
BASE_WITHOUT_STACKS: Final = 2
ADAPTER: Final = 3
#: Of adapters without such rows: an older qosora reads them.
ADAPTER_WITHOUT_TOKENS: Final = 2
MANIFEST: Final = 1
UNFINISHED: Final = 1
RUN: Final = 1


def require_known(where: object, version: object, known: int) -> None:
    """Refuse a format that is newer than this version of qosora.

    Args:
        where: File that says it, for the message.
        version: What it says, None where it says nothing.
        known: The newest that can be read.

    Raises:
        CheckpointError: If it is newer, or no version at all.
    """
    if version is None:
        return
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format_version must be a positive integer, got {version!r}; get another copy")
    if version > known:
        raise CheckpointError(
            f"{where} has format version {version}, and this version of qosora reads up to {known}: update qosora"
        )
