"""The two configurations that a user names, as with QLoRA; both refuse unknown keys and report all problems at once.

| module | one line |
|---|---|
| `base` | `QosoraConfig`: how a base is stored |
| `adapter` | `OsoraConfig`: what is trained on it |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.config.adapter import OSORA as OSORA
    from qosora.config.adapter import OsoraConfig as OsoraConfig
    from qosora.config.base import QUANT_METHOD as QUANT_METHOD
    from qosora.config.base import QosoraConfig as QosoraConfig

__getattr__, __dir__ = door(
    __name__,
    {"base": ["QUANT_METHOD", "QosoraConfig"], "adapter": ["OSORA", "OsoraConfig"]},
)
