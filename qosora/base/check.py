"""How far a base is from the model that it was made of, by what both expect after each token of some text.

A weight's error says little of the output's: NF4 errs least where activations are large. The divergence of the next
token's distribution is what an untrained base costs. The original streams by, as for a calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qosora.base.calibrate import AllThere, streamed_model, token_rows
from qosora.base.load import load_base
from qosora.checkpoints import open_source
from qosora.errors import CheckpointError, first_line

__all__ = ["Divergence", "divergence"]

logger = logging.getLogger("qosora")


@dataclass(frozen=True)
class Divergence:
    """What a base loses before it is trained, over the tokens of some text.

    Attributes:
        tokens: That were predicted.
        kl: KL(p ‖ q) of the next token's distribution, p the original's and q the base's, nats per token.
        same_top: Part of the tokens for which both have the same likeliest next one.
        original_loss: Cross-entropy of the text under the original, nats per token.
        base_loss: The same under the base.
    """

    tokens: int
    kl: float
    same_top: float
    original_loss: float
    base_loss: float


def divergence(
    source: str | Path,
    base: str | Path,
    texts: Sequence[str] | Sequence[list[int]],
    *,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Divergence:
    """Compare a base with the model that it was made of.

    Args:
        source: Folder or hub id of the original, or a GGUF file.
        base: Folder of the base.
        texts: Texts, or lists of token ids; the first 4096 tokens are used.
        device: Where to compute; the GPU by default, if there is one.
        trust_remote_code: Whether to run model code that either brings.

    Raises:
        CheckpointError: If one of them cannot be run.
        ConfigError: If there is no token in the texts.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    with open_source(source, trust_remote_code=trust_remote_code) as checkpoint:
        rows = token_rows(texts, checkpoint.origin, trust_remote_code)
        precise = torch.float32 if device.type == "cpu" else None
        original = streamed_model(checkpoint, device, trust_remote_code, precise)
        made = load_base(
            base, dtype=original.config.dtype, device_map={"": device}, trust_remote_code=trust_remote_code
        ).eval()
        logger.info("comparing %s with %s on %d tokens", base, source, rows.numel())
        for row in torch.split(rows, 1):  # the logits of a row are all that is held
            try:
                with AllThere():
                    sums += _compared(original, made, row.to(device))
            except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{source}: {type(original).__name__} does not run with one module's weights at a time "
                    f"({first_line(error)}), so it cannot be compared"
                ) from error
            count += row.numel() - 1
    kl, same, original_loss, base_loss = (sums / max(count, 1)).tolist()
    return Divergence(count, kl, same, original_loss, base_loss)


@torch.inference_mode()
def _compared(original: Any, base: Any, row: torch.Tensor) -> torch.Tensor:
    """Return the sums over a row's tokens of what `Divergence` has the means of, (4,), float64."""
    p, q = (
        F.log_softmax(model(input_ids=row, use_cache=False).logits[0, :-1].float(), -1) for model in (original, base)
    )
    following = row[0, 1:, None]
    found = [
        (p.exp() * (p - q)).sum(),
        (p.argmax(-1) == q.argmax(-1)).sum(),
        -p.gather(1, following).sum(),
        -q.gather(1, following).sum(),
    ]
    return torch.stack([value.double().cpu() for value in found])
